# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Whole runs of a tiny model: what they leave behind, and that a resumed one goes on as if nothing had happened."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.data.blocks import select_part
from composer_bema.training.outputs import loss_curves, read_metrics
from composer_bema.training.run import build_trainer, train
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
    curves = loss_curves(records)
    assert {label: [step for step, _ in points] for label, points in curves.items()} == dict.fromkeys(
        ['one', 'two'], [0, 3, 6]
    )
    assert curves['one'] == curves['two']
    step, loss = curves['one'][-1]
    row = next(line for line in report.splitlines() if line.startswith('one'))
    assert row.split() == ['one', str(step), f'{loss:.4f}', f'{math.exp(loss):.3f}']


def test_without_evaluators_there_is_no_table(tmp_path, yaml):
    report = train(load_config(yaml, ['eval_loader=null', 'max_duration=1ba']))
    assert report.startswith('settings: ')
    assert not (tmp_path / 'run' / 'curves.png').exists()


def test_a_run_resumed_in_the_middle_of_an_epoch_ends_bit_equal(tmp_path, yaml):
    """Epochs are 9 steps long here: the break at step 4 is inside the first, the end inside the second."""
    common = ['save_interval=4ba', 'max_duration=11ba', 'eval_interval=100ba']
    whole = weights_after(yaml, *common, f'run_folder={tmp_path}/whole')
    common.append(f'run_folder={tmp_path}/parts')
    half = weights_after(yaml, *common, f'save_folder={tmp_path}/checkpoints', 'max_duration=4ba')
    resumed = weights_after(yaml, *common, f'save_folder={tmp_path}/checkpoints', 'autoresume=true')
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(half[name], resumed[name]) for name in whole)
    steps = [r['batch'] for r in read_metrics(tmp_path / 'parts' / 'metrics.jsonl') if 'loss/train/total' in r]
    assert steps == list(range(11))


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
    curves = loss_curves(read_metrics(tmp_path / 'run' / 'metrics.jsonl'))
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
    assert loss_curves(records)['held_out']


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('train_loader.dataset.part=test', "train_loader.dataset: part must be 'train', 'held_out' or 'all'"),
        ('eval_loader.1.dataset.paths=nothing', "eval_loader.1.dataset: No file matches 'nothing'"),
        ('optimizer.lr=fast', 'optimizer: '),
        ('callbacks.hf_checkpointer={save_folder: x, precision: fp8}', 'callbacks.hf_checkpointer: precision must be'),
    ],
)
def test_values_that_a_builder_refuses_are_named(yaml, override, message):
    with pytest.raises(ConfigError, match=message):
        build_trainer(load_config(yaml, [override]))
