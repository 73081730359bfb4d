# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages of directories of checkpoints: those that were kept during training, from and into every format."""

import json

import peft
import pytest
import torch
from composer import Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_bema.formats.composer import open_checkpoint
from composer_bema.formats.huggingface import write_adapter
from composer_bema.offline.export import export
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize
from composer_bema.offline.trajectory import Trajectory
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
    'dema': Setting('dema', {'ema_power': 0.3}),
    'ouema': Setting('ouema', {'bias_power': 0.6}, update_after=4),
    'lawa': Setting('lawa', {'window': 3}),
    'swa_window': Setting('swa_window', {'horizon': 8, 'period': 4}),
}
BEMA = ONLINE['average']
# The model before the first step has no adapter.
ADAPTERS = Setting('bema', update_freq=2, update_after=2)
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
        assert_holds(folder, weights[step][ONLINE[name].title])


def test_the_checkpoints_themselves(tmp_path):
    """They are no average, and may go into one afterwards."""
    source = run('average')
    stabilize(source.checkpoints, tmp_path / 'out', Setting('training'), at=[6, 12])
    for step in (6, 12):
        assert_holds(tmp_path / f'out/step{step}', source.weights[step]['training'], atol=0)
    stabilize(tmp_path / 'out', tmp_path / 'mean', Setting('lawa', {'window': 2}))
    mean = {n: (t + source.weights[12]['training'][n]) / 2 for n, t in source.weights[6]['training'].items()}
    assert_holds(tmp_path / 'mean', mean)


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


@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_bf16_is_rounded_once(tmp_path, dtype):
    """The arithmetic is fp32's, so that what is written is as near to the exact average as its dtype allows."""
    source = run('bf16')
    (average,) = Trajectory(source.checkpoints, initial_model=source.initial_model).plan(BEMA)
    stabilize(source.checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model, dtype=dtype)
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == (dtype or 'bfloat16')
    for name, tensor in written.items():
        assert tensor.dtype == (torch.float32 if dtype else torch.bfloat16)
        trajectory = [source.weights[step]['training'][f'model.{name}'] for step in (0, *STEPS)]
        exact = sum(c * weights.double() for c, weights in zip(average.coefficients, trajectory, strict=True))
        # Half of the last bit: eight bits of bf16's, beside which fp32's rounding is small.
        half_ulp = torch.exp2(torch.frexp(exact).exponent.double() - 9)
        allowed = 1e-6 * exact.abs().max() + (0 if dtype else half_ulp)
        assert ((tensor.double() - exact).abs() <= allowed).all(), name


def test_frozen_weights_come_out_as_they_went_in(tmp_path):
    source = run('bf16')
    stabilize(source.checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model)
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    frozen = {name: tensor for name, tensor in written.items() if name.startswith('model.layers.0.')}
    assert frozen
    assert all(torch.equal(tensor, source.weights[0]['training'][f'model.{n}']) for n, tensor in frozen.items())


def adapter_average(source):
    """The average of an adapter's weights from step 2 on, by the names that they have in Composer's checkpoints."""
    (average,) = Trajectory(source.checkpoints).plan(ADAPTERS)
    weights = [source.weights[step]['training'] for step in STEPS]
    return {
        name: sum(c * w[name].double() for c, w in zip(average.coefficients, weights, strict=True)).float()
        for name in weights[0]
        if 'lora_' in name
    }


def assert_holds_adapter(folder, source):
    base = AutoModelForCausalLM.from_pretrained(source.initial_model)
    model = peft.PeftModel.from_pretrained(base, folder)
    state = {f'model.{name}': tensor for name, tensor in model.state_dict().items() if 'lora_' in name}
    expected = adapter_average(source)
    assert set(state) == set(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert not (folder / 'model.safetensors').exists()


def test_adapters_of_composer_become_an_adapter(tmp_path):
    source = run('lora')
    stabilize(source.checkpoints, tmp_path / 'out', ADAPTERS)
    assert_holds_adapter(tmp_path / 'out', source)


def test_folders_of_adapters_become_an_adapter(tmp_path):
    source = run('lora')
    model = make_model(lora=True)
    for step in STEPS:
        weights = {name.removeprefix('model.'): tensor for name, tensor in source.weights[step]['training'].items()}
        write_adapter(tmp_path / 'in' / f'checkpoint-{step}', model.model, weights)
    stabilize(tmp_path / 'in', tmp_path / 'out', ADAPTERS, max_shard_size='1KB')
    assert {path.name for path in (tmp_path / 'out').glob('adapter*')} == {
        'adapter_config.json',
        'adapter_model.safetensors',
    }
    assert_holds_adapter(tmp_path / 'out', source)


@pytest.mark.parametrize('how', [as_huggingface, None])
def test_large_models_are_written_in_shards(tmp_path, how):
    source = run('average')
    checkpoints = how(source, tmp_path / 'in') if how else source.checkpoints
    stabilize(checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model, max_shard_size='8KB')
    files = list((tmp_path / 'out').glob('*.safetensors'))
    assert len(files) > 1
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map'].values()) == {file.name for file in files}
    assert_holds(tmp_path / 'out', source.weights[12]['BEMA'])


def test_what_belongs_to_the_model_travels_along(tmp_path):
    """From the checkpoint of the average's step; what belongs to the run stays where it is."""
    source = run('average')
    as_huggingface(source, tmp_path / 'in')
    belongs = {
        'chat_template.jinja': '{{ messages }}',
        'generation_config.json': '{"max_new_tokens": 7}',
        'modeling_own.py': 'x = 1',
    }
    for step in STEPS:
        folder = tmp_path / 'in' / f'checkpoint-{step}'
        for name, text in belongs.items():
            (folder / name).write_text(text if step == 12 else '')
        for name in ('scheduler.pt', 'rng_state.pth', 'training_args.bin'):
            (folder / name).touch()
    stabilize(tmp_path / 'in', tmp_path / 'out', BEMA, initial_model=source.initial_model)
    written = {path.name for path in (tmp_path / 'out').iterdir()}
    assert written == {
        *belongs,
        *(path.name for path in (tmp_path / 'in' / 'checkpoint-12').glob('*token*')),
        'config.json',
        'model.safetensors',
        'averaging.json',
    }
    assert all((tmp_path / 'out' / name).read_text() == text for name, text in belongs.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / 'out').generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / 'out').chat_template == '{{ messages }}'


@pytest.mark.parametrize(
    ('content', 'problem'),
    [(b'{"a": ', 'Expecting value'), (b'[]', 'it holds a list'), (b'"\xff"', 'codec'), (b'', 'Expecting value')],
)
def test_a_configuration_that_is_none_is_named(tmp_path, content, problem):
    source = run('average')
    path = as_huggingface(source, tmp_path / 'in') / 'checkpoint-12' / 'config.json'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^'{path}' is damaged \(.*{problem}.*\): restore the configuration") as info:
        stabilize(tmp_path / 'in', tmp_path / 'out', BEMA, initial_model=source.initial_model)
    assert '\n' not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_some_tensors_are_copied(tmp_path):
    source = run('average')
    copy = ['*.norm.weight', 'model.model.layers.0.*']
    stabilize(source.checkpoints, tmp_path / 'out', BEMA, initial_model=source.initial_model, copy=copy)
    expected = source.weights[12]
    copied = {name for name in expected['BEMA'] if name.startswith('model.model.layers.0.') or '.norm.' in name}
    assert_holds(tmp_path / 'out', {n: expected['training' if n in copied else 'BEMA'][n] for n in expected['BEMA']})
    assert json.loads((tmp_path / 'out' / 'averaging.json').read_text())['copied'] == sorted(copied)
    with pytest.raises(ValueError, match=r"The pattern 'norm' of what is to be copied fits no tensor of '.*ep2-ba12"):
        stabilize(source.checkpoints, tmp_path / 'none', BEMA, initial_model=source.initial_model, copy=['norm'])


def test_exports_of_training_weights_are_averaged_and_averages_are_not(tmp_path):
    source = run('average')
    for step in STEPS:
        (checkpoint,) = source.checkpoints.glob(f'ep*-ba{step}-rank0.pt')
        for weights in ('training', 'average'):
            export(checkpoint, tmp_path / weights / f'step{step}', weights=weights)
    stabilize(tmp_path / 'training', tmp_path / 'out', BEMA, initial_model=source.initial_model)
    assert_holds(tmp_path / 'out', source.weights[12]['BEMA'])
    with pytest.raises(ValueError, match=r"step2' holds the BEMA weights, as its averaging\.json says"):
        stabilize(tmp_path / 'average', tmp_path / 'twice', BEMA, initial_model=source.initial_model)
    assert not (tmp_path / 'twice').exists()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'dtype': 'fp8'}, "dtype must be one of float32, bfloat16, float16, float64, not 'fp8'"),
        ({'at': [5]}, 'has no update at step 5, but at 4, 6, 8, 10, 12'),
        ({'max_shard_size': 'much'}, 'much'),
        ({'weights': 'model'}, 'holds the BEMA weights, and an average of averages is hardly what you want'),
    ],
)
def test_what_is_wrong_leaves_nothing(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        stabilize(run('average').checkpoints, tmp_path / 'out', ADAPTERS, **kwargs)
    assert not list(tmp_path.iterdir())
