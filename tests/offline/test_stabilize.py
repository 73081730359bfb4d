# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages of directories of checkpoints: those that were kept during training, from and into every format."""

import json

import pytest
import torch
from composer import Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_bema.formats.composer import open_checkpoint
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize
from tests.distributed import programs
from tests.formats.runs import make_model
from tests.offline.runs import (
    STEPS,
    as_compressed,
    as_huggingface,
    as_safetensors,
    as_shards,
    run,
)

# The settings of the runs' algorithms.
ONLINE = {
    'average': Setting('bema', update_freq=2),
    'training': Setting('bema', update_freq=2),
    'late': Setting('bema', {'lag': 1, 'bias_power': 0.4}, update_freq=2, update_after=4),
    'half-life': Setting('bema', {'half_life': 5}),
    'ema': Setting('ema', {'smoothing': 0.6}),
}
BEMA = ONLINE['average']
LAST = 'ep2-ba12-rank0.pt'


def assert_holds(folder, expected, atol=1e-6):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype='auto')
    state = {f'model.{name}': tensor for name, tensor in model.state_dict().items()}
    assert set(state) == set(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize('name', ONLINE)
def test_offline_is_what_was_online(tmp_path, name):
    """The average that a Trainer has kept, and that of the checkpoints that it saved at every update."""
    checkpoints, weights = run(name)
    initial_model = run(name).initial_model
    at = [step for step in STEPS if step > ONLINE[name].update_after]
    folders = stabilize(checkpoints, tmp_path / 'out', ONLINE[name], at=at, initial_model=initial_model)
    assert [folder.name for folder in folders] == [f'step{step}' for step in at]
    for step, folder in zip(at, folders, strict=True):
        assert_holds(folder, weights[step]['EMA' if name == 'ema' else 'BEMA'])


@pytest.mark.parametrize('how', [as_huggingface, as_shards, as_compressed])
def test_every_format_is_read(tmp_path, how):
    source = run('average')
    checkpoints = how(source, tmp_path / 'in')
    stabilize(checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model)
    assert_holds(tmp_path / 'out', source.weights[12]['BEMA'])
    assert AutoTokenizer.from_pretrained(tmp_path / 'out')('ab')['input_ids'] == [100, 101, 1]


def test_weights_of_other_formats_too(tmp_path):
    source = run('average')
    expected = source.weights[12]['BEMA']
    as_huggingface(source, tmp_path / 'bin', safe=False, name='step{}')
    stabilize(tmp_path / 'bin', tmp_path / 'from-bin', BEMA, initial_model=source.initial_model)
    assert_holds(tmp_path / 'from-bin', expected)
    as_safetensors(source, tmp_path / 'bare')
    stabilize(tmp_path / 'bare', tmp_path / 'from-bare', BEMA, initial_model=source.initial_model)
    written = load_file(tmp_path / 'from-bare' / 'model.safetensors')
    assert set(written) == set(expected)
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_composer_checkpoint_is_loaded_by_a_trainer(tmp_path):
    source = run('average')
    stabilize(source.checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model, format='composer')
    path = tmp_path / 'out' / LAST
    assert open_checkpoint(path).batch == 12
    assert open_checkpoint(path).average_names == ['BEMA']
    model = make_model()
    Trainer(model=model, load_path=str(path), load_weights_only=True, load_strict_model_weights=True, device='cpu')
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, source.weights[12]['BEMA'][name], rtol=0, atol=1e-6)


def test_other_models_of_composer_come_out_as_its_checkpoints(tmp_path):
    """BatchNorm's statistics follow the EMA, and what counts batches is that of the last checkpoint."""
    source = run('classifier')
    setting = Setting('bema', update_freq=2, update_after=2)
    stabilize(source.checkpoints, tmp_path / 'out', setting)
    (path,) = (tmp_path / 'out').glob('*.pt')
    model = programs.make_model()
    Trainer(model=model, load_path=str(path), load_weights_only=True, load_strict_model_weights=True, device='cpu')
    state = model.state_dict()
    assert state['module.1.num_batches_tracked'] == 12
    assert (state['module.1.running_var'] > 0).all()


def test_the_manifest_says_how_it_was_made(tmp_path):
    source = run('average')
    stabilize(source.checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model)
    manifest = json.loads((tmp_path / 'out' / 'averaging.json').read_text())
    assert (manifest['weights'], manifest['rule'], manifest['step']) == ('BEMA', 'bema', 12)
    assert [checkpoint['step'] for checkpoint in manifest['checkpoints']] == [0, *STEPS]
    assert sum(checkpoint['coefficient'] for checkpoint in manifest['checkpoints']) == pytest.approx(1)
    assert manifest['checkpoints'][-1]['bytes'] == (source.checkpoints / LAST).stat().st_size
    assert len({checkpoint['xxh3_64'] for checkpoint in manifest['checkpoints']}) == 7
