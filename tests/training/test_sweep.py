# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Sweeps from their YAML: models and losses, and what is said about wrong ones."""

import csv
import json
from unittest import mock

import pytest
from composer import Trainer
from composer.utils import dist
from safetensors.torch import load_file

from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize
from composer_bema.training.config import ConfigError
from composer_bema.training.data.sections import build_evaluators
from composer_bema.training.models import build_hf_causal_lm
from composer_bema.training.sweep import run_sweep
from composer_bema.training.tokenizers import build_tokenizer
from tests.offline.runs import as_huggingface, run
from tests.training.tiny import TINY_MODEL, write_yaml

MAX_SEQ_LEN = 16
BATCH_SIZE = 4
PARTS = {'held_out': 'held_out', 'seen': 'train'}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text('The quick brown fox jumps over the lazy dog, and does so again. ' * 12)
    return path


def settings_of(**sections):
    grids = [
        {'rule': 'bema', 'update_freq': 2, 'ema_power': [0.2, 0.5], 'bias_power': [0.2, 0.4]},
        {'rule': 'lawa', 'window': [2, 4]},
    ]
    return {'initial_model': run('average').initial_model, 'averages': grids, **sections}


def loaders(text):
    dataset = {'paths': str(text), 'train_fraction': 0.5}
    return [
        {'label': label, 'name': 'text_files', 'dataset': {**dataset, 'part': part}} for label, part in PARTS.items()
    ]


def evaluate(text, **changes):
    return {
        'model': {
            'name': 'hf_causal_lm',
            'pretrained_model_name_or_path': run('average').initial_model,
            'use_train_metrics': False,
        },
        'tokenizer': {'name': 'bytes'},
        'max_seq_len': MAX_SEQ_LEN,
        'device_eval_batch_size': BATCH_SIZE,
        'eval_loader': loaders(text),
        **changes,
    }


def losses_of(model, text):
    """What a Trainer says of a written model."""
    tokenizer = build_tokenizer({'name': 'bytes'})
    evaluators = build_evaluators(loaders(text), tokenizer, MAX_SEQ_LEN, BATCH_SIZE)
    built = build_hf_causal_lm(tokenizer, str(model), use_train_metrics=False)
    trainer = Trainer(model=built, eval_dataloader=evaluators, device='cpu', progress_bar=False)
    trainer.eval()
    trainer.close()
    return {
        label: float(metrics['LanguageCrossEntropy'].compute()) for label, metrics in trainer.state.eval_metrics.items()
    }


def test_averages_are_written(tmp_path):
    settings = settings_of(write={'dtype': 'bfloat16', 'max_shard_size': '1MB'}, at=[8, 12])
    out = tmp_path / 'out'
    table = run_sweep(run('average').checkpoints, write_yaml(tmp_path, settings), out)
    folders = sorted(str(path.parent.relative_to(out)) for path in out.glob('*/*/config.json'))
    assert len(folders) == 12
    assert folders[0] == 'bema,ema_power=0.2,bias_power=0.2,update_freq=2/step12'
    assert all(str(out / folder) in table for folder in folders)
    stabilize(run('average').checkpoints, tmp_path / 'one', Setting('lawa', {'window': 4}), dtype='bfloat16')
    written = load_file(out / 'lawa,window=4' / 'step12' / 'model.safetensors')
    for name, tensor in load_file(tmp_path / 'one' / 'model.safetensors').items():
        assert (written[name].float() - tensor.float()).abs().max() <= 2**-7 * tensor.float().abs().max()
    manifest = json.loads((out / 'lawa,window=4' / 'step8' / 'averaging.json').read_text())
    assert (manifest['rule'], manifest['settings'], manifest['step']) == ('lawa', {'window': 4}, 8)


def test_one_step_and_one_pattern_need_no_list(tmp_path):
    settings = settings_of(averages={'rule': 'lawa', 'window': 2}, at=8, copy='*.norm.weight', write={})
    run_sweep(run('average').checkpoints, write_yaml(tmp_path, settings), tmp_path / 'out')
    manifest = json.loads((tmp_path / 'out' / 'lawa,window=2' / 'step8' / 'averaging.json').read_text())
    assert (manifest['step'], manifest['copied']) == (8, ['model.model.norm.weight'])


@pytest.mark.parametrize('as_folders', [False, True])
def test_averages_are_evaluated(tmp_path, text, as_folders):
    source = run('average')
    checkpoints = as_huggingface(source, tmp_path / 'in') if as_folders else source.checkpoints
    settings = settings_of(evaluate=evaluate(text), at=[8, 12])
    out = tmp_path / 'out'
    closing = run_sweep(checkpoints, write_yaml(tmp_path, settings), out)

    rows = [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]
    keys = {'rule': 'bema', 'ema_power': 0.5, 'bias_power': 0.2, 'update_freq': 2, 'step': 12}
    assert len(rows) == 12
    assert list(rows[0]) == [*keys, *PARTS]
    stabilize(checkpoints, tmp_path / 'one', Setting('bema', update_freq=2), initial_model=source.initial_model)
    expected = losses_of(tmp_path / 'one', text)
    (row,) = [row for row in rows if keys.items() <= row.items()]
    assert {label: row[label] for label in expected} == pytest.approx(expected, rel=1e-5)
    with (out / 'results.csv').open(newline='') as file:
        table = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == [
        {name: value for name, value in row.items() if value} for row in table
    ]

    for label in PARTS:
        for rule in ('bema', 'lawa'):
            best = min((row for row in rows if row['rule'] == rule), key=lambda row: row[label])
            setting = {n: v for n, v in best.items() if n not in ('rule', 'step', *PARTS)}
            described = ' '.join([rule, *(f'{name}={value}' for name, value in setting.items())])
            assert f'Best {rule} by {label}: {described} at step {best["step"]}, {best[label]:.4f}\n' in closing
    kinds = ('loss', 'ema_power', 'bias_power', 'window', 'heat-map-bema')
    pictures = {f'{kind}-{label}.png' for kind in kinds for label in PARTS}
    assert {path.name for path in out.iterdir()} == {*pictures, 'results.csv', 'results.jsonl'}
    assert all((out / name).read_bytes().startswith(b'\x89PNG') for name in pictures)
    assert str(out / 'results.csv') in closing


def test_the_best_are_named_with_their_horizon(tmp_path, text):
    grid = {'rule': 'swa_window', 'horizon': [4, 8], 'update_freq': 2}
    settings = settings_of(averages=grid, evaluate=evaluate(text, eval_loader=loaders(text)[0], dtype='float16'))
    closing = run_sweep(run('average').checkpoints, write_yaml(tmp_path, settings), tmp_path / 'out')
    assert 'Best swa_window by held_out: swa_window horizon=' in closing
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        'horizon-held_out.png',
        'results.csv',
        'results.jsonl',
    }


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['evaluat=1'], "^evaluat is not a setting; the nearest one is 'evaluate'"),
        (['averages=null'], '^averages is missing from the settings'),
        (['averages=[]'], r'^averages is an empty list: give a grid, such as `\{rule: bema\}`, or several\.$'),
        (['averages={rule: {a: 1}}'], r"^averages: There is no rule \{'a': 1\}, but bema, ema"),
        (['averages={rule: [[bema]]}'], r"^averages: There is no rule \['bema'\], but bema, ema"),
        (['averages={rule: []}'], "^averages: The list of values of 'rule' is empty"),
        (['averages=3'], '^averages must hold `key: value` pairs, not 3'),
        (['averages=[bema]'], r"^averages\.0 must hold `key: value` pairs, not 'bema'"),
        (['averages={rule: lawa, windw: 2}'], "^averages: The rule 'lawa' has no setting 'windw', but window"),
        (['averages.1.rule=law'], r"^averages\.1: There is no rule 'law'"),
        (['averages={rule: lawa, window: [2, 3, 2]}'], '^averages: lawa window=2 is there twice'),
        (['averages={rule: lawa, window: 0}'], 'window'),
        (['averages={rule: lawa, window: two}'], 'window'),
        (['averages={rule: ema, ema_power: high}'], 'ema_power'),
        (['at=late'], "^at: Value 'late' of type 'str' could not be converted to Integer"),
        (['at={step: 8}'], r"^at must be a value or a list of values, not \{'step': 8\}"),
        (['at=[[8]]'], r'^at must be a value or a list of values, not \[\[8\]\]'),
        (['copy=[{a: b}]'], '^copy must be a value or a list of values, not'),
        (['copy=bias'], "^The pattern 'bias' of what is to be copied fits no tensor"),
        (['evaluate=*x'], r"^The value of the override 'evaluate=\*x' is not valid YAML"),
        (['at=[7]'], 'has no update at step 7, but at 2, 4, 6, 8, 10, 12'),
        (['write={}'], 'needs one of two sections'),
        (['evaluate=null'], 'needs one of two sections'),
        (['evaluate=null', 'write={form: x}'], r"^write\.form is not a setting; the nearest one is 'write\.format'"),
        (['evaluate=null', 'write={dtype: fp8}'], "^dtype must be one of .*, not 'fp8'"),
        (['evaluate=null', 'write={format: pickle}'], "^format must be one of huggingface, composer, not 'pickle'"),
        (['evaluate.dtype=fp8'], r"^evaluate\.dtype must be one of float32, bfloat16, float16, float64, not 'fp8'"),
        (['evaluate.precision=fp8'], r"^evaluate\.precision must be one of fp32, .*, not 'fp8'"),
        (['evaluate.max_seq_len=null'], r'^evaluate\.max_seq_len is missing'),
        (['evaluate.modle=1'], r"^evaluate\.modle is not a setting; the nearest one is 'evaluate\.model'"),
        (['evaluate.model.name=x'], r'model\.name'),
        (['evaluate.model.pretraind=1'], r"model\.pretraind is not a setting; the nearest one is 'model\.pretrained'"),
        (['evaluate.eval_loader.0.dataset.part=x'], "must be one of train, held_out, all, not 'x'"),
        (['evaluate.eval_loader.1.label=held_out'], "'held_out' is the label of another evaluator"),
        (['evaluate.eval_loader=[]'], r'^evaluate\.eval_loader names no loader'),
        (['evaluate=3'], '^evaluate must hold `key: value` pairs, not 3'),
        (['evaluate=null', 'write=true'], '^write must hold `key: value` pairs, not True'),
    ],
)
def test_wrong_settings(tmp_path, text, overrides, message):
    path = write_yaml(tmp_path, settings_of(evaluate=evaluate(text)))
    before = set(tmp_path.iterdir())
    with pytest.raises((ValueError, TypeError), match=message):
        run_sweep(run('average').checkpoints, path, tmp_path / 'out', overrides)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        ({'num_hidden_layers': 1}, r"they have a tensor 'model\.model\.layers\.1\..*' more"),
        (
            {'num_hidden_layers': 3},
            r"another model than the model that evaluate\.model names: they lack the tensor 'model\.model\.",
        ),
        ({'intermediate_size': 16}, r"The tensor 'model\.model\.layers\.0\.mlp\..*' has the shape \(12, 8\) in the"),
    ],
)
def test_checkpoints_of_another_model(tmp_path, text, model, message):
    like = {'hidden_size': 8, 'num_hidden_layers': 2, 'intermediate_size': 12, 'vocab_size': 259}
    other = {**TINY_MODEL, 'config': {**TINY_MODEL['config'], **like, **model}}
    path = write_yaml(tmp_path, settings_of(evaluate=evaluate(text, model=other)))
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run_sweep(run('average').checkpoints, path, tmp_path / 'out')
    assert set(tmp_path.iterdir()) == before


def test_what_is_interrupted_leaves_nothing(tmp_path, text):
    path = write_yaml(tmp_path, settings_of(evaluate=evaluate(text)))
    before = set(tmp_path.iterdir())
    with mock.patch.object(Trainer, 'eval', side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run_sweep(run('average').checkpoints, path, tmp_path / 'out')
    assert set(tmp_path.iterdir()) == before


def test_losses_are_computed_by_one_process(tmp_path, text):
    path = write_yaml(tmp_path, settings_of(evaluate=evaluate(text)))
    with (
        mock.patch.object(dist, 'get_world_size', return_value=2),
        pytest.raises(ConfigError, match='^evaluate takes one process, not 2: start it without torchrun.$'),
    ):
        run_sweep(run('average').checkpoints, path, tmp_path / 'out')
