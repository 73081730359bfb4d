# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages in runs of llm-foundry, by its own command and with nothing to import: evaluated, saved and resumed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from composer_bema.training.data.convert import convert_to_mds
from composer_bema.training.data.python_manual import manual_topics
from composer_bema.training.tokenizers import build_tokenizer
from tests.llmfoundry.foundry import (
    NO_LLM_FOUNDRY,
    ROOT,
    SEQUENCE_LENGTH,
    SMALL,
    SMALL_MPT,
    TOKENIZER,
    foundry_bin,
    load_checkpoint,
    read_hyperparameters,
    read_metrics,
    run_command,
    train,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(foundry_bin() is None, reason=NO_LLM_FOUNDRY)]

PRETRAIN = ROOT / 'yamls/llmfoundry/pretrain_mpt_125m.yaml'
FINETUNE = ROOT / 'yamls/llmfoundry/finetune_qwen2.5_1.5b.yaml'
LOSS_SCRIPT = Path(__file__).with_name('loss_of_folder.py')

BEMA_EVERY_STEP = {'algorithms.bema.update_after': '1ba', 'algorithms.bema.update_freq': '1ba'}
PRETRAIN_SMALL = {**SMALL, **SMALL_MPT, **BEMA_EVERY_STEP, 'scheduler.t_warmup': '1ba', 'scheduler.t_decay': '0.5dur'}

LOSS = 'metrics/eval/{label}/LanguageCrossEntropy'
OTHER_AVERAGES = ('dema', 'ema', 'lawa', 'ouema', 'swa_window')
Tensors = Mapping[str, torch.Tensor]
LAST_STEP = 8


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MDS folders of a few KB."""
    folder = tmp_path_factory.mktemp('data')
    text = '\n'.join(manual_topics())
    tokenizer = build_tokenizer({'name': 'bytes'})
    for part, begin, rows in (('train', 0, 64), ('val', 10_000, 16)):
        file = folder / f'{part}.txt'
        file.write_text(text[begin : begin + rows * SEQUENCE_LENGTH], encoding='ascii', errors='replace')
        assert convert_to_mds([str(file)], folder / part, tokenizer, SEQUENCE_LENGTH) == rows
    return folder


@pytest.fixture(scope='module')
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe's run, which was not interrupted."""
    folder = tmp_path_factory.mktemp('pretrained')
    train(PRETRAIN, folder, {**PRETRAIN_SMALL, 'variables.data': data})
    return folder


@pytest.fixture(scope='module')
def resumed(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same command where a run that was killed has left its first checkpoint."""
    folder = tmp_path_factory.mktemp('resumed')
    checkpoints = checkpoints_of(folder)
    checkpoints.mkdir(parents=True)
    first = checkpoint_of(pretrained, LAST_STEP // 2)
    shutil.copy(first, checkpoints)
    (checkpoints / 'latest-rank0.pt').symlink_to(first.name)
    train(PRETRAIN, folder, {**PRETRAIN_SMALL, 'variables.data': data})
    return folder


def checkpoints_of(folder: Path, recipe: Path = PRETRAIN) -> Path:
    return folder / 'runs' / recipe.stem / 'checkpoints'


def checkpoint_of(folder: Path, step: int, recipe: Path = PRETRAIN) -> Path:
    (file,) = checkpoints_of(folder, recipe).glob(f'ep*-ba{step}-rank0.pt')
    return file


def hf_folder_of(folder: Path, step: int, recipe: Path = PRETRAIN) -> Path:
    return folder / 'runs' / recipe.stem / 'hf/huggingface' / f'ba{step}'


def averages_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state of all averages, as it is stored."""
    return dict(checkpoint['state']['callbacks'])['AveragingCheckpoint']


def model_in(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights, by the names of the Hugging Face model."""
    return {name.removeprefix('model.'): tensor for name, tensor in checkpoint['state']['model'].items()}


def training_weights_in(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    weights = averages_in(checkpoint)['BEMA']['training_weights']
    return {name.removeprefix('model.'): tensor for name, tensor in weights.items()}


def assert_same(tensors: Tensors, others: Tensors) -> None:
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different


def plain(value: Any) -> Any:
    """A nested state with lists in place of tensors, to be compared as a whole."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_the_doctor_finds_that_it_goes_together():
    printed = run_command('composer-bema', 'doctor', folder=ROOT)
    assert 'llmfoundry_algorithms: bema, dema, ema, lawa, ouema, swa_window\n' in printed
    assert printed.endswith('\nWhat is installed goes together.\n')


@pytest.mark.parametrize('step', [LAST_STEP // 2, LAST_STEP])
def test_the_hugging_face_folder_holds_the_bema_weights(pretrained: Path, step: int):
    checkpoint = load_checkpoint(checkpoint_of(pretrained, step))
    saved = load_file(hf_folder_of(pretrained, step) / 'model.safetensors')
    average, training = model_in(checkpoint), training_weights_in(checkpoint)
    assert averages_in(checkpoint)['model_holds'] == 'BEMA'
    assert_same(saved, {name: average[name] for name in saved})
    assert not any(torch.equal(saved[name], training[name]) for name in training)
    # EMA_t + alpha_t (theta_t - theta_0), from what is stored and the paper's alpha_t = (rho + t)^-eta.
    buffers = averages_in(checkpoint)['BEMA']['buffers']
    for name, theta in training.items():
        ema, theta_0 = (buffers[buffer][f'model.{name}'] for buffer in ('ema', 'theta_0'))
        torch.testing.assert_close(saved[name], ema + (10 + step) ** -0.2 * (theta - theta_0), rtol=1e-5, atol=1e-6)


def test_evaluations_see_the_average_and_the_training_weights_by_their_labels(
    pretrained: Path, data: Path, tmp_path: Path
):
    average = hf_folder_of(pretrained, LAST_STEP)
    training = shutil.copytree(average, tmp_path / 'training')
    weights = training_weights_in(load_checkpoint(checkpoint_of(pretrained, LAST_STEP)))
    save_file(weights, training / 'model.safetensors', metadata={'format': 'pt'})
    printed = run_command('python', '-I', LOSS_SCRIPT, data / 'val', average, training, folder=tmp_path)
    metrics = read_metrics(pretrained)
    logged = [metrics[LOSS.format(label=label)][LAST_STEP] for label in ('bema', 'training')]
    assert logged == pytest.approx([float(line) for line in printed.split()], abs=1e-5)
    assert abs(logged[0] - logged[1]) > 1e-3


def test_a_resumed_run_goes_on_bit_for_bit(pretrained: Path, resumed: Path):
    whole, parts = (load_checkpoint(checkpoint_of(folder, LAST_STEP))['state'] for folder in (pretrained, resumed))
    for key in ('model', 'optimizers', 'schedulers'):
        assert plain(whole[key]) == plain(parts[key])
    assert plain(averages_in({'state': whole})) == plain(averages_in({'state': parts}))
    assert_same(*(load_file(hf_folder_of(folder, LAST_STEP) / 'model.safetensors') for folder in (pretrained, resumed)))
    for label in ('bema', 'training'):
        name = LOSS.format(label=label)
        assert read_metrics(resumed)[name][LAST_STEP] == read_metrics(pretrained)[name][LAST_STEP]
    # It did go on, and not begin again.
    assert min(read_metrics(resumed)['bema/alpha']) > LAST_STEP // 2 >= min(read_metrics(pretrained)['bema/alpha'])


def test_the_schedule_and_the_averages_numbers_reach_the_logger(pretrained: Path):
    metrics = read_metrics(pretrained)
    assert {'bema/alpha', 'bema/beta', 'bema/num_updates', 'bema/distance'} <= metrics.keys()
    assert any(name.startswith('flops/') for name in metrics)
    # Of what stays the same MLflow is told once: a step of warmup, the peak, and 1 - sqrt(u) of it as the decay begins.
    rates = metrics['lr-DecoupledAdamW/group0']
    assert list(rates.values()) == pytest.approx([0, 6e-4, *(6e-4 * (1 - u**0.5) for u in (0.25, 0.5, 0.75))])


def test_the_other_averages_in_one_run(data: Path, tmp_path: Path):
    """With a label each, on the other schedule: what a user gets by editing the recipe."""
    config = yaml.safe_load(PRETRAIN.read_text())
    frequent = {'update_freq': '1ba'}
    more = {'lawa': {'window': 2}, 'swa_window': {'horizon': '4ba'}}
    config['algorithms'] = {
        name: {**frequent, 'eval_labels': [f'eval/{name}'], **more.get(name, {})} for name in OTHER_AVERAGES
    }
    config['eval_loader'] = [{**config['eval_loader'][0], 'label': label} for label in ('training', *OTHER_AVERAGES)]
    config['scheduler'] = {'name': 'cosine_with_constant_tail', 't_warmup': '1ba', 't_tail': '0.5dur'}
    recipe = tmp_path / 'averages.yaml'
    recipe.write_text(yaml.safe_dump(config))
    train(recipe, tmp_path, {**SMALL, **SMALL_MPT, 'variables.data': data})

    metrics = read_metrics(tmp_path)
    losses = [metrics[LOSS.format(label=label)][LAST_STEP] for label in ('training', *OTHER_AVERAGES)]
    assert len(set(losses)) == len(losses)
    assert {f'{name.replace("_", "")}/num_updates' for name in OTHER_AVERAGES} <= metrics.keys()
    rates = metrics['lr-DecoupledAdamW/group0']
    # The cosine from the peak to a tenth of it in three steps, and no change after that.
    assert list(rates.values()) == pytest.approx([0, 6e-4, 4.65e-4, 1.95e-4, 6e-5])
    checkpoint = load_checkpoint(checkpoint_of(tmp_path, LAST_STEP))
    stored = averages_in(checkpoint)
    assert stored.keys() == {'model_holds', 'DEMA', 'EMA', 'LAWA', 'OUEMA', 'SWAWindow'}
    # With several averages none of them owns the checkpoint, and so neither the Hugging Face folder.
    assert stored['model_holds'] == 'training'
    saved = load_file(hf_folder_of(tmp_path, LAST_STEP) / 'model.safetensors')
    assert_same(saved, {name: model_in(checkpoint)[name] for name in saved})


def test_the_recipe_that_finetunes(tmp_path: Path):
    folder = tmp_path / 'rows'
    folder.mkdir()
    for split, count in (('train', 32), ('test', 8)):
        rows = [{'prompt': f'What is {n} and 1?\n', 'response': f'{n + 1}.'} for n in range(count)]
        (folder / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    overrides = {**SMALL, **BEMA_EVERY_STEP, 'variables.data': folder}
    train(FINETUNE, tmp_path, {**overrides, 'model.pretrained_model_name_or_path': TOKENIZER})

    checkpoint = load_checkpoint(checkpoint_of(tmp_path, LAST_STEP, FINETUNE))
    assert averages_in(checkpoint)['model_holds'] == 'BEMA'
    saved = load_file(hf_folder_of(tmp_path, LAST_STEP, FINETUNE) / 'model.safetensors')
    assert_same(saved, {name: model_in(checkpoint)[name] for name in saved})
    assert not any(torch.equal(saved[name], theta) for name, theta in training_weights_in(checkpoint).items())
    losses = [read_metrics(tmp_path)[LOSS.format(label=label)][LAST_STEP] for label in ('bema', 'training')]
    assert losses[0] != losses[1]


def test_the_runs_settings_are_hyperparameters(pretrained: Path):
    assert 'algorithms' in read_hyperparameters(pretrained)
