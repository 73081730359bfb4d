# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Whole runs of a tiny model: what they leave behind, and that a resumed one goes on as if nothing had happened."""

import copy
import json
import math
import traceback
from typing import Any
from unittest import mock

import pytest
import torch
from composer.utils import dist
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM

from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.data.blocks import select_part
from composer_bema.training.outputs import evaluation_curves, read_metrics
from composer_bema.training.run import _resume_settings, build_trainer, train
from tests.distributed.ranks import run_ranks
from tests.formats.runs import saved
from tests.training.tiny import tiny_settings, write_yaml


@pytest.fixture
def yaml(tmp_path):
    return write_yaml(tmp_path, tiny_settings(tmp_path))


def weights_after(path, *overrides):
    trainer = build_trainer(load_config(path, overrides))
    trainer.fit()
    trainer.close()
    return {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}


def test_a_run_leaves_settings_metrics_picture_and_table(tmp_path, yaml):
    report = train(load_config(yaml, ['eval_first=true']))
    run = tmp_path / 'run'
    assert sorted(path.name for path in run.iterdir()) == ['config.yaml', 'curves.png', 'metrics.jsonl']
    records = read_metrics(run / 'metrics.jsonl')
    losses = [record['loss/train/total'] for record in records if 'loss/train/total' in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    # 4 sequences of 32 tokens a step.
    assert records[-1]['token'] == 6 * 4 * 32
    curves = evaluation_curves(records)
    assert {label: [step for step, _ in points] for label, points in curves.items()} == dict.fromkeys(
        ['one', 'two'], [0, 3, 6]
    )
    assert curves['one'] == curves['two']
    step, loss = curves['one'][-1]
    row = next(line for line in report.splitlines() if line.startswith('one'))
    # The average has had no update yet.
    assert row.split() == ['one', 'training', str(step), f'{loss:.4f}', f'{math.exp(loss):.3f}']


def test_all_settings_reach_the_loggers(tmp_path, yaml):
    log = tmp_path / 'log.txt'
    train(load_config(yaml, [f'loggers.file_logger.filename={log}', 'algorithms.bema.update_freq=2ba']))
    lines = [line for line in log.read_text().splitlines() if line.startswith('[hyperparameter]: ')]
    logged = dict(line.removeprefix('[hyperparameter]: ').strip().split(': ', maxsplit=1) for line in lines)
    assert (logged['optimizer.lr'], logged['algorithms.bema.update_freq']) == ('0.0100', '"2ba"')
    assert (logged['bema/update_freq'], logged['bema/bias_power']) == ('"2ba"', '0.2000')
    # Of lists and what was left empty, too.
    assert '"label": "one"' in logged['eval_loader']
    assert logged['load_path'] == 'None'


def test_the_table_says_which_weights_an_evaluator_sees(yaml):
    report = train(load_config(yaml, ['algorithms.bema={update_freq: 2ba, eval_labels: [two]}']))
    assert [line.split()[:2] for line in report.splitlines()[2:4]] == [['one', 'training'], ['two', 'BEMA']]


def test_without_evaluators_there_is_no_table(tmp_path, yaml):
    report = train(load_config(yaml, ['eval_loader=null', 'max_duration=1ba']))
    assert report.startswith('settings: ')
    assert not (tmp_path / 'run' / 'curves.png').exists()


def same(one, other):
    """Whether two nests of containers, tensors and numbers are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


AVERAGES = [
    'algorithms.ema={update_freq: 3ba, half_life: 5ba, eval_labels: [one], save_weights: training}',
    'algorithms.bema={update_freq: 2ba, update_after: 1ba, eval_labels: [two], save_weights: average}',
]


@pytest.mark.parametrize('way', ['autoresume', 'load_path'])
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_bit_equal(tmp_path, yaml, way):
    """Epochs are 9 steps long here: the break at step 4 is inside the first, the end inside the second."""
    common = [*AVERAGES, 'save_interval=4ba', 'max_duration=11ba', 'eval_interval=3ba']

    def run(folder, *overrides):
        trainer = build_trainer(load_config(yaml, [*common, f'run_folder={tmp_path}/{folder}', *overrides]))
        trainer.fit()
        trainer.close()
        curves = evaluation_curves(read_metrics(tmp_path / folder / 'metrics.jsonl'))
        algorithms = {type(algorithm).__name__: algorithm.state_dict() for algorithm in trainer.state.algorithms}
        return copy.deepcopy((trainer.state.model.state_dict(), algorithms)), curves

    whole, whole_curves = run('whole')
    save_folder = f'save_folder={tmp_path}/checkpoints'
    half, _ = run('parts', save_folder, 'max_duration=4ba')
    how = {
        'autoresume': ['autoresume=true', save_folder],
        'load_path': [f'load_path={tmp_path}/checkpoints/latest-rank0.pt'],
    }
    resumed, curves = run('parts', *how[way])
    assert same(resumed, whole)
    assert {
        label: [(step, loss) for step, loss in points if step != 4] for label, points in curves.items()
    } == whole_curves
    assert not same(half, whole)
    steps = [r['batch'] for r in read_metrics(tmp_path / 'parts' / 'metrics.jsonl') if 'loss/train/total' in r]
    assert steps == list(range(11))


def half_a_checkpoint(path):
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size // 2)


def test_a_killed_run_resumes_from_the_newest_whole_checkpoint(tmp_path, yaml, caplog):
    """Composer's own autoresume would follow the link to the unfinished checkpoint, or to nothing, and start anew."""
    common = [*AVERAGES, 'max_duration=6ba']
    whole = weights_after(yaml, *common, f'run_folder={tmp_path}/whole')
    common += [f'save_folder={tmp_path}/{{run_name}}', 'run_name=killed', f'run_folder={tmp_path}/parts']
    checkpoints = tmp_path / 'killed'
    weights_after(yaml, *common, 'save_interval=2ba', 'autoresume=true')
    half_a_checkpoint(checkpoints / 'ep0-ba6-rank0.pt')
    assert same(weights_after(yaml, *common, 'save_interval=2ba', 'autoresume=true'), whole)
    (warning,) = [record for record in caplog.records if record.name.startswith('composer_bema.formats')]
    assert "ep0-ba6-rank0.pt' is not whole (its end is missing" in warning.getMessage()
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        'ep0-ba2-rank0.pt',
        'ep0-ba4-rank0.pt',
        'ep0-ba6-rank0.pt',
        'ep0-ba6-rank0.pt.incomplete',
        'latest-rank0.pt',
    ]
    steps = [r['batch'] for r in read_metrics(tmp_path / 'parts' / 'metrics.jsonl') if 'loss/train/total' in r]
    assert steps == [*range(6), 4, 5]
    # Killed between removing the link and making it again.
    (checkpoints / 'latest-rank0.pt').unlink()
    trainer = build_trainer(load_config(yaml, [*common, 'autoresume=true']))
    assert trainer.state.timestamp.batch == 6
    trainer.close()


def test_where_no_checkpoint_is_whole_the_run_starts_as_if_there_were_none(tmp_path, yaml):
    """With `load_path`, which is for the start of a run, and not for its resumption."""
    weights_after(yaml, f'save_folder={tmp_path}/before', 'max_duration=1ba', f'run_folder={tmp_path}/before/run')
    start = [f'load_path={tmp_path}/before/latest-rank0.pt', 'load_weights_only=true', 'autoresume=true']
    overrides = [*start, f'save_folder={tmp_path}/checkpoints', 'save_interval=1ba', 'max_duration=2ba']
    first = weights_after(yaml, *overrides)
    for name in ('ep0-ba1-rank0.pt', 'ep0-ba2-rank0.pt'):
        half_a_checkpoint(tmp_path / 'checkpoints' / name)
    assert same(weights_after(yaml, *overrides), first)
    assert len(list((tmp_path / 'checkpoints').glob('*.incomplete'))) == 2
    # And once there is a checkpoint, it is resumed whole, load_weights_only or not.
    trainer = build_trainer(load_config(yaml, overrides))
    assert trainer.state.timestamp.batch == 2
    trainer.close()


def names_in(folder):
    return {path.name for path in folder.iterdir() if not path.is_symlink()}


def test_a_run_that_replaces_another_leaves_none_of_its_checkpoints(tmp_path, yaml):
    """And only when all that it needs was built."""
    checkpoints = tmp_path / 'run' / 'checkpoints'
    common = [f'save_folder={checkpoints}', 'save_overwrite=true']
    weights_after(yaml, *common, 'save_interval=1ba', 'max_duration=5ba')
    (checkpoints / 'notes.txt').write_text('mine')
    before = names_in(checkpoints)
    with pytest.raises((ConfigError, FileNotFoundError)):
        build_trainer(load_config(yaml, [*common, f'load_path={tmp_path}/nothing.pt', 'load_weights_only=true']))
    assert names_in(checkpoints) == before
    weights_after(yaml, *common, 'save_interval=2ba', 'max_duration=3ba')
    assert names_in(checkpoints) == {'ep0-ba2-rank0.pt', 'ep0-ba3-rank0.pt', 'notes.txt'}


@pytest.mark.parametrize(
    'start',
    [
        ['autoresume=true'],
        # It goes on from its own, by whatever name; or starts anew from one of them; or it shares the folder.
        ['load_path={sub}/../run/checkpoints/ep0-ba3-rank0.pt'],
        ['load_path={link}/checkpoints/ep0-ba3-rank0.pt'],
        ['load_path={run}/checkpoints/ep0-ba3-rank0.pt', 'load_weights_only=true'],
        ['run_folder={sub}', 'run_name=other'],
    ],
)
def test_checkpoints_that_are_not_replaced_stay(tmp_path, yaml, start):
    run = tmp_path / 'run'
    common = [f'save_folder={run}/checkpoints', 'save_overwrite=true', 'save_interval=1ba']
    weights_after(yaml, *common, 'max_duration=5ba')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'link').symlink_to(run)
    where = {name: tmp_path / name for name in ('run', 'sub', 'link')}
    overrides = [text.format(**where) for text in start]
    build_trainer(load_config(yaml, [*common, *overrides])).close()
    assert names_in(run / 'checkpoints') == {f'ep0-ba{step}-rank0.pt' for step in range(1, 6)}


@pytest.mark.parametrize(('save_folder', 'autoresume'), [('s3://bucket/{run_name}', True), ('checkpoints', False)])
def test_composers_own_autoresume_is_for_remote_folders(tmp_path, yaml, monkeypatch, save_folder, autoresume):
    arguments = {}
    monkeypatch.setattr('composer_bema.training.run.Trainer', lambda **kwargs: arguments.update(kwargs))
    monkeypatch.chdir(tmp_path)
    weights = saved('none')
    (tmp_path / 'checkpoints').mkdir()
    weights.copy_to(tmp_path / 'checkpoints')
    build_trainer(load_config(yaml, ['autoresume=true', f'save_folder={save_folder}', 'load_path=given.pt']))
    assert arguments['autoresume'] == autoresume
    assert arguments['load_path'] == ('given.pt' if autoresume else 'checkpoints/ep0-ba4-rank0.pt')


@pytest.mark.parametrize(('fsdp_config', 'given'), [('null', None), ('{}', {'fsdp': {}})])
def test_an_empty_fsdp_config_asks_for_fsdp(yaml, monkeypatch, fsdp_config, given):
    arguments = {}
    monkeypatch.setattr('composer_bema.training.run.Trainer', lambda **kwargs: arguments.update(kwargs))
    build_trainer(load_config(yaml, [f'fsdp_config={fsdp_config}']))
    assert arguments['parallelism_config'] == given


def test_a_finished_run_that_is_started_again_only_reports(tmp_path, yaml):
    overrides = [f'save_folder={tmp_path}/checkpoints', 'autoresume=true', 'max_duration=2ba']
    first = train(load_config(yaml, overrides))
    assert 'evaluator' in first
    assert train(load_config(yaml, overrides)) == first


def test_the_loss_of_an_evaluator_is_the_mean_over_its_target_tokens(tmp_path, yaml):
    """Ten held-out blocks in batches of four, the last one smaller, and each token weighs the same."""
    trainer = build_trainer(load_config(yaml, ['max_duration=1ba']))
    trainer.fit()
    trainer.close()
    blocks = trainer.state.evaluators[0].dataloader.dataloader.dataset.blocks
    assert len(blocks) == 10
    tokens = torch.from_numpy(blocks)
    with torch.no_grad():
        logits = trainer.state.model.model.eval()(input_ids=tokens).logits
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    _, loss = evaluation_curves(read_metrics(tmp_path / 'run' / 'metrics.jsonl'))['one'][-1]
    assert loss == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04'])
def test_a_file_that_is_no_checkpoint_is_named_and_leaves_nothing(tmp_path, yaml, content):
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(ConfigError, match=r"The checkpoint in '.*x\.pt' cannot be loaded into this run"):
        build_trainer(load_config(yaml, [f'load_path={tmp_path}/x.pt']))
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_of_another_model_is_named(tmp_path, yaml):
    save_folder = f'save_folder={tmp_path}/checkpoints'
    weights_after(yaml, save_folder, 'max_duration=1ba')
    overrides = [save_folder, 'autoresume=true', 'model.config.hidden_size=32']
    with pytest.raises(ConfigError, match=r"The checkpoint in '.*/ep0-ba1-rank0\.pt' cannot be loaded .*size mismatch"):
        build_trainer(load_config(yaml, overrides))


def test_of_an_error_on_all_ranks_the_reason_is_given(yaml, monkeypatch):
    failures: Any = {rank: (RuntimeError('Missing key: x.'), traceback.extract_stack()) for rank in range(2)}
    monkeypatch.setattr(
        'composer_bema.training.run.Trainer', mock.Mock(side_effect=CheckpointException('load', failures))
    )
    with pytest.raises(ConfigError, match=r"^The checkpoint in 'x' .* \(RuntimeError: Missing key: x\.\)$"):
        build_trainer(load_config(yaml, ['load_path=x']))


def test_the_seed_decides_the_weights(tmp_path, yaml):
    runs = [
        weights_after(yaml, f'seed={seed}', 'max_duration=1ba', f'run_folder={tmp_path}/{number}')
        for number, seed in enumerate((1, 1, 2))
    ]
    name = 'model.model.layers.0.mlp.up_proj.weight'
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])


@pytest.mark.parametrize(('precision', 'dtype'), [('float32', torch.float32), ('bfloat16', torch.bfloat16)])
def test_hugging_face_folder(tmp_path, yaml, precision, dtype):
    folder = tmp_path / 'hf'
    folder.mkdir()
    (folder / 'stale').touch()
    callback = f'callbacks.hf_checkpointer={{save_folder: {folder}, precision: {precision}}}'
    trained = weights_after(yaml, callback)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype='auto')
    assert model.dtype == dtype
    written = model.state_dict()
    assert {f'model.{name}' for name in written} == set(trained)
    assert all(torch.equal(trained[f'model.{name}'].to(dtype), tensor) for name, tensor in written.items())
    assert not (folder / 'stale').exists()
    # And it is what `model` and `tokenizer` take.
    names = [f'model={{name: hf_causal_lm, pretrained_model_name_or_path: {folder}}}', f'tokenizer.name={folder}']
    again = build_trainer(load_config(yaml, [*names, 'save_overwrite=true']))
    assert all(
        torch.equal(tensor, written[name.removeprefix('model.')].float())
        for name, tensor in again.state.model.state_dict().items()
    )
    again.close()


@pytest.mark.parametrize('save_weights', ['training', 'average'])
def test_the_hugging_face_folder_holds_what_save_weights_names(tmp_path, yaml, save_weights):
    overrides = [
        f'algorithms.bema={{update_freq: 2ba, eval_labels: [two], save_weights: {save_weights}}}',
        f'callbacks.hf_checkpointer.save_folder={tmp_path}/hf',
    ]
    trained = weights_after(yaml, *overrides)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').state_dict()
    differs = [not torch.equal(trained[f'model.{name}'], tensor) for name, tensor in written.items()]
    assert any(differs) == (save_weights == 'average')


def test_eval_labels_compare_weights_in_one_run(tmp_path, yaml):
    train(load_config(yaml, ['algorithms.bema={update_freq: 2ba, eval_labels: [two]}']))
    curves = evaluation_curves(read_metrics(tmp_path / 'run' / 'metrics.jsonl'))
    assert all(one != two for one, two in zip(curves['one'], curves['two'], strict=True))


def test_packed_conversations_train(tmp_path):
    rows = [
        {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': str(i)}]} for i in range(32)
    ]
    (tmp_path / 'chat.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    template = '{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}'
    template += '{% if add_generation_prompt %}<a>{% endif %}'
    hf_kwargs = {'data_files': str(tmp_path / 'chat.jsonl'), 'cache_dir': str(tmp_path / 'cache')}
    dataset = {'hf_name': 'json', 'hf_kwargs': hf_kwargs, 'train_fraction': 0.75}
    settings = tiny_settings(tmp_path) | {
        'tokenizer': {'name': 'bytes', 'kwargs': {'chat_template': template}},
        'global_train_batch_size': 2,
        'device_train_microbatch_size': 1,
        'train_loader': {'name': 'finetuning', 'dataset': {**dataset, 'packing': True, 'shuffle': True}},
        'eval_loader': {'name': 'finetuning', 'label': 'held_out', 'dataset': {**dataset, 'part': 'held_out'}},
        'max_duration': '1ep',
    }
    train(load_config(write_yaml(tmp_path, settings)))
    records = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    # `<u>a<a>9` has 8 tokens, `<u>a<a>10` has 9, and padding does not count.
    kept = select_part(32, 'train', 0.75, 17)
    assert records[-1]['token'] == sum(8 if number < 10 else 9 for number in kept)
    assert evaluation_curves(records)['held_out']


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('global_train_batch_size=64', 'train_loader: drop_last drops the only batch: .* fewer than 64 samples'),
        (
            'model.config.vocab_size=100',
            'model: the tokenizer has 259 tokens, but the vocabulary of the model only 100',
        ),
        ('model.config.num_attention_heads=0', 'model: integer division'),
        ('eval_loader.1.dataset.paths=nothing', "eval_loader.1.dataset: No file matches 'nothing'"),
        ('optimizer.lr=-1', 'optimizer: Invalid learning rate'),
        ('callbacks.hf_checkpointer={save_folder: x, precision: fp8}', 'callbacks.hf_checkpointer: precision must be'),
    ],
)
def test_values_that_a_builder_refuses_are_named(yaml, override, message):
    with pytest.raises(ConfigError, match=message):
        build_trainer(load_config(yaml, [override]))


def resume_settings(yaml, folders):
    dist.initialize_dist('cpu')
    save_folder = folders[dist.get_global_rank()]
    return _resume_settings(load_config(yaml, ['autoresume=true', f'save_folder={save_folder}']))


@pytest.mark.slow
def test_rank_0_looks_for_the_checkpoint_and_the_others_are_told(tmp_path, yaml):
    (tmp_path / 'checkpoints').mkdir()
    saved('none').copy_to(tmp_path / 'checkpoints')
    one, other = run_ranks(resume_settings, 2, yaml, [str(tmp_path / 'checkpoints'), str(tmp_path / 'nothing')])
    assert one == other
    assert one['load_path'] == str(tmp_path / 'checkpoints' / 'ep0-ba4-rank0.pt')
