# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of real runs as Hugging Face folders: the weights asked for, bit for bit, or a sentence and no folder."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_bema.formats.manifest import read_manifest
from composer_bema.offline.export import export
from tests.formats.runs import make_model, saved, saved_in_parts

KINDS = {'monolithic': saved, 'sharded': saved_in_parts}


def assert_holds(folder, expected, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype='auto')
    assert model.dtype == dtype
    state = model.state_dict()
    assert {f'model.{name}' for name in state} == set(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[f'model.{name}'].to(dtype)), name


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('weights', 'average', 'expected'),
    [
        ('average', 'BEMA', 'BEMA'),
        ('average', 'EMA', 'EMA'),
        ('training', None, 'training'),
        ('theta_0', 'bema', 'theta_0'),
    ],
)
def test_weights_of_a_tied_model(tmp_path, kind, weights, average, expected):
    path, truth = KINDS[kind]('two averages')
    assert export(path, tmp_path / 'out', weights=weights, average=average) == tmp_path / 'out'
    assert_holds(tmp_path / 'out', truth[expected], torch.float32)
    assert 'lm_head.weight' not in load_file(tmp_path / 'out' / 'model.safetensors')
    assert AutoTokenizer.from_pretrained(tmp_path / 'out')('ab')['input_ids'] == [100, 101, 1]
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('precision', [None, 'float32', 'float16'])
def test_precision(tmp_path, kind, precision):
    """The average of a bf16 model has been kept in fp32, and that is what is rounded, once."""
    path, truth = KINDS[kind]('bf16')
    export(path, tmp_path / 'out', precision=precision)
    dtype = torch.bfloat16 if precision is None else getattr(torch, precision)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', torch_dtype='auto')
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    if precision is None:
        assert_holds(tmp_path / 'out', truth['BEMA'], dtype)
        return
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', torch_dtype=torch.float32).state_dict()
    rounded = {f'model.{name}': tensor.to(torch.bfloat16) for name, tensor in exact.items()}
    changed = [name for name, tensor in rounded.items() if not torch.equal(tensor, truth['BEMA'][name])]
    # A trip through fp16 may round another way.
    assert not changed if precision == 'float32' else len(changed) < len(rounded)
    assert any(not torch.equal(tensor, rounded[f'model.{name}'].float()) for name, tensor in exact.items())


@pytest.mark.parametrize('kind', KINDS)
def test_adapters(tmp_path, kind):
    peft = pytest.importorskip('peft')
    path, truth = KINDS[kind]('lora')
    export(path, tmp_path / 'out')
    assert not (tmp_path / 'out' / 'model.safetensors').exists()
    state = peft.PeftModel.from_pretrained(make_model().model, tmp_path / 'out').state_dict()
    for name, tensor in truth['BEMA'].items():
        assert torch.equal(state[name.removeprefix('model.')], tensor), name


def test_a_checkpoint_of_weights_only(tmp_path):
    path, truth = saved('weights only')
    export(path, tmp_path / 'out', weights='model')
    assert_holds(tmp_path / 'out', truth['BEMA'], torch.float32)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('two averages', {}, 'holds several averages: say which one of BEMA, EMA'),
        ('none', {}, "holds no average, only the 'training' weights"),
        (
            'two averages',
            {'precision': 'fp8'},
            "precision must be one of float32, bfloat16, float16, float64, not 'fp8'",
        ),
        ('classifier', {}, r"The model in '.*' is not a HuggingFaceModel of Composer, which export needs"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(tmp_path, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(saved(name).path, tmp_path / 'a' / 'out', **arguments)
    assert not [path for path in tmp_path.rglob('*') if path.name != 'a']


def test_a_damaged_tensor_leaves_nothing(tmp_path):
    path = saved('training').copy_to(tmp_path)
    content = path.read_bytes()
    (tmp_path / 'theta_0').mkdir()
    pattern = torch.ones(8, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    damaged = content.replace(pattern, pattern[:-1] + b'\x00')
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"the tensor '.*norm.*' in theta_0 of its BEMA average is not what was saved"):
        export(path, tmp_path / 'theta_0', weights='theta_0')
    assert not list((tmp_path / 'theta_0').iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(FileExistsError, match='exists and is not an empty folder'):
        export(saved('training').path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize(
    ('weights', 'average', 'holds'),
    [
        ('average', 'ema', 'EMA'),
        ('training', None, 'training'),
        ('model', None, 'BEMA'),
        ('theta_0', 'bema', 'BEMA theta_0'),
    ],
)
def test_a_folder_says_whose_weights_it_has(tmp_path, weights, average, holds):
    path, _ = saved('two averages')
    export(path, tmp_path / 'out', weights=weights, average=average)
    manifest = read_manifest(tmp_path / 'out')
    assert manifest is not None
    assert (manifest['weights'], manifest['checkpoint']) == (holds, str(path))
