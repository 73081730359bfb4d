# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Files of safetensors, filled piece by piece: the library and transformers read what was written, by whomever."""

import contextlib
import json
import multiprocessing
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from composer_bema.formats.pretrained import read_safetensors
from composer_bema.formats.safetensors_files import DTYPES, SafetensorsFiles, bytes_of, write_json
from composer_bema.formats.tensors import LazyTensor, TensorSpec

SHAPES = ((), (0,), (3, 0), (1,), (7,), (2, 3), (2, 1, 5))


def random_bits(shape, dtype):
    """Any bits, NaNs and all; of a bool only those that it may have."""
    numel = torch.Size(shape).numel()
    bits = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8)
    return (bits % 2 if dtype == torch.bool else bits).view(dtype).reshape(shape)


def specs_of(tensors):
    return {name: LazyTensor.of(tensor).spec for name, tensor in tensors.items()}


def write_all(files, tensors, size):
    """Writes tensors in pieces of ``size`` elements, the last one first."""
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in reversed(range(0, flat.numel(), size)):
            files.write(name, start, flat[start : start + size])


def write(folder, tensors, size=4, **kwargs):
    files = SafetensorsFiles(folder, specs_of(tensors), **kwargs)
    files.create()
    write_all(files, tensors, size)
    files.close()


def assert_same(found, tensors):
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert bytes(bytes_of(found[name])) == bytes(bytes_of(tensor)), name


# What the library reads


@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_the_library_reads_tensors_of_any_dtype_and_shape(tmp_path, dtype):
    """To the bit; beside a byte that would put all others at odd places."""
    tensors = {f'x{index}': random_bits(shape, dtype) for index, shape in enumerate(SHAPES)}
    tensors = {'byte': torch.tensor(7, dtype=torch.uint8), **tensors}
    write(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
    assert_same(load_file(tmp_path / 'model.safetensors'), tensors)
    assert_same({n: lazy.read() for n, lazy in read_safetensors(tmp_path / 'model.safetensors').items()}, tensors)


def test_tensors_of_all_dtypes_in_one_file_begin_where_theirs_may(tmp_path):
    tensors = {name: random_bits((3,), dtype) for name, dtype in DTYPES.items()}
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / 'model.safetensors'), tensors)
    content = (tmp_path / 'model.safetensors').read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and len(content) == 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    assert all(header[name]['data_offsets'][0] % dtype.itemsize == 0 for name, dtype in DTYPES.items())


@given(numel=st.integers(0, 40), size=st.integers(1, 41), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_pieces_of_any_size_in_any_order(tmp_path_factory, numel, size, dtype):
    folder = tmp_path_factory.mktemp('files')
    tensors = {'a': random_bits((numel,), dtype), 'b': random_bits((numel, 2), torch.int8)}
    write(folder, tensors, size)
    assert_same(load_file(folder / 'model.safetensors'), tensors)


def test_the_file_says_that_it_is_of_torch_and_names_may_be_any(tmp_path):
    """A file without this format is refused by transformers."""
    tensors = {'é "quoted"\n': torch.ones(2), 'a.b': torch.zeros(3)}
    write(tmp_path, tensors, stem='adapter_model')
    with safe_open(tmp_path / 'adapter_model.safetensors', framework='pt') as file:
        assert file.metadata() == {'format': 'pt'}
    assert_same(load_file(tmp_path / 'adapter_model.safetensors'), tensors)


def test_values_are_rounded_to_the_dtype_of_the_file(tmp_path):
    files = SafetensorsFiles(tmp_path, {'a': TensorSpec(torch.Size([2, 2]), torch.bfloat16)})
    files.create()
    files.write('a', 0, torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-8], dtype=torch.float64))
    files.write('a', 3, torch.tensor([2.5]))
    files.close()
    # bf16 has seven bits behind the point, and halves go to the even one.
    assert load_file(tmp_path / 'model.safetensors')['a'].tolist() == [[1, 1], [1 + 2**-6, 2.5]]


def test_what_is_too_large_for_the_dtype_is_refused(tmp_path):
    """The largest number of fp16 is 65504; infinities that were there already are none of its business."""
    files = SafetensorsFiles(tmp_path, {'a': TensorSpec(torch.Size([2]), torch.float16)})
    files.create()
    files.write('a', 0, torch.tensor([65504.0, -float('inf')]))
    for values in ([1.0, 7e4], [-7e4, float('inf')]):
        with pytest.raises(
            ValueError, match=r"^Values of the tensor 'a' are too large for torch\.float16: write it in"
        ):
            files.write('a', 0, torch.tensor(values))
    files.close()
    assert load_file(tmp_path / 'model.safetensors')['a'].tolist() == [65504, -float('inf')]


@pytest.mark.parametrize(
    ('source', 'target', 'number'),
    [
        (torch.float64, torch.float32, 1e39),
        (torch.float32, torch.bfloat16, 3.4e38),
        (torch.bfloat16, torch.float16, 7e4),
    ],
)
def test_no_narrowing_makes_an_infinity(tmp_path, source, target, number):
    files = SafetensorsFiles(tmp_path, {'a': TensorSpec(torch.Size([1]), target)})
    files.create()
    with pytest.raises(ValueError, match=f"tensor 'a' are too large for {target}: write it in another dtype"):
        files.write('a', 0, torch.tensor([number], dtype=source))
    files.write('a', 0, torch.ones(1, dtype=source))
    files.close()
    assert load_file(tmp_path / 'model.safetensors')['a'].tolist() == [1]


def test_what_is_too_large_for_eight_bits_is_refused(tmp_path):
    """Of which torch cannot say whether they are finite."""
    files = SafetensorsFiles(tmp_path, {'a': TensorSpec(torch.Size([1]), torch.float8_e4m3fn)})
    files.create()
    with pytest.raises(ValueError, match=r"tensor 'a' are too large for torch\.float8_e4m3fn"):
        files.write('a', 0, torch.tensor([1e6]))
    files.write('a', 0, torch.tensor([2.0]))
    files.close()


@contextlib.contextmanager
def largest_file(size):
    """Writing larger files fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_errors_of_writing_name_the_file(tmp_path):
    files = SafetensorsFiles(tmp_path, {'a': TensorSpec(torch.Size([1000]), torch.float32)})
    message = r"^\[Errno 27\] File too large: '.*model\.safetensors'$"
    with largest_file(1000), pytest.raises(OSError, match=message):
        files.create()
    files.create()
    with largest_file(1000), pytest.raises(OSError, match=message):
        files.write('a', 0, torch.ones(1000))
    files.close()
    with largest_file(1000), pytest.raises(OSError, match=r"^\[Errno 27\] File too large: '.*x\.json'$"):
        write_json(tmp_path / 'x.json', 'x' * 2000)


def test_what_is_not_written_is_zero(tmp_path):
    files = SafetensorsFiles(tmp_path, {'a': TensorSpec(torch.Size([3]), torch.float32)})
    files.create()
    files.write('a', 1, torch.ones(1))
    files.close()
    assert load_file(tmp_path / 'model.safetensors')['a'].tolist() == [0, 1, 0]


# Several files


def test_transformers_loads_several_files_by_their_index(tmp_path, make_causal_lm):
    model = make_causal_lm(hidden_size=8, intermediate_size=12)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    write(tmp_path, state, size=5, max_shard_size='2KB')
    files = sorted(path.name for path in tmp_path.glob('*.safetensors'))
    assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05}.safetensors'
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert (set(index['weight_map']), set(index['weight_map'].values())) == (set(state), set(files))
    assert index['metadata']['total_size'] == sum(tensor.nbytes for tensor in state.values())
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(loaded.state_dict(), state)


def test_a_file_begins_when_one_is_full(tmp_path):
    """One tensor is never in two; without a size there is one file."""
    tensors = {name: torch.full((count,), 1.0) for name, count in {'a': 2, 'b': 2, 'c': 30, 'd': 1}.items()}
    write(tmp_path, tensors, max_shard_size=16)
    found = [load_file(path) for path in sorted(tmp_path.glob('*.safetensors'))]
    assert sorted(sorted(each) for each in found) == [['a', 'b'], ['c'], ['d']]
    assert_same({n: tensor for each in found for n, tensor in each.items()}, tensors)
    (tmp_path / 'one').mkdir()
    write(tmp_path / 'one', tensors, max_shard_size=None)
    assert [path.name for path in (tmp_path / 'one').iterdir()] == ['model.safetensors']


@pytest.mark.parametrize('size', [2000, '2000', ' 2000 ', '2KB', '2 kb', '2000B', '0.002MB'])
def test_a_size_is_a_number_or_a_text(tmp_path, size):
    write(tmp_path, many_tensors(), size=1000, max_shard_size=size)
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in tmp_path.glob('*.safetensors')]
    assert 1700 < max(sizes) <= 2000


@pytest.mark.parametrize(
    'size', ['foo', '5XB', 'GB', '', '-5', '-5GB', -1, 0, '0', '0GB', '1e3', 'nanGB', 'infGB', True]
)
def test_a_size_that_is_none_is_refused(tmp_path, size):
    message = f"max_shard_size must be a number of bytes or a text such as '5GB', but is {size!r}."
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        SafetensorsFiles(tmp_path, specs_of({'a': torch.ones(2)}), max_shard_size=size)


@pytest.mark.parametrize('dtype', [torch.complex128, torch.quint8])
def test_a_dtype_that_the_format_lacks_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"^Safetensors cannot hold the tensor 'b', whose dtype is {dtype}"):
        SafetensorsFiles(
            tmp_path, {'a': TensorSpec(torch.Size([1]), torch.int8), 'b': TensorSpec(torch.Size([1]), dtype)}
        )
    assert not list(tmp_path.iterdir())


# Several writers


def many_tensors():
    generator = torch.Generator().manual_seed(1)
    return {f'x{n}': torch.randn(50 + n, generator=generator) for n in range(40)}


def test_threads_write_at_the_same_time(tmp_path):
    tensors = many_tensors()
    files = SafetensorsFiles(tmp_path, specs_of(tensors), max_shard_size='2KB')
    files.create()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: write_all(files, dict([item]), 3), tensors.items()))
    files.close()
    found = [load_file(path) for path in tmp_path.glob('*.safetensors')]
    assert len(found) > 3
    assert_same({n: tensor for each in found for n, tensor in each.items()}, tensors)


def write_share(folder, share):
    """What a process does that has not made the files; module level, to be found by a fresh interpreter."""
    tensors = many_tensors()
    files = SafetensorsFiles(folder, specs_of(tensors), max_shard_size='2KB')
    write_all(files, {name: tensors[name] for name in share}, 3)
    files.close()


def test_processes_write_their_shares(tmp_path):
    """One makes the files, and all of them agree on where everything is."""
    tensors = many_tensors()
    SafetensorsFiles(tmp_path, specs_of(tensors), max_shard_size='2KB').create()
    names = list(tensors)
    # Forked, for a fresh interpreter would take seconds to import torch.
    processes = [
        multiprocessing.get_context('fork').Process(target=write_share, args=(tmp_path, names[n::2])) for n in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [load_file(path) for path in tmp_path.glob('*.safetensors')]
    assert_same({n: tensor for each in found for n, tensor in each.items()}, tensors)


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir('/proc/self/fd'))
    files = SafetensorsFiles(tmp_path, specs_of(many_tensors()), max_shard_size='2KB')
    files.create()
    assert len(os.listdir('/proc/self/fd')) == before
    files.write('x0', 0, torch.ones(1))
    assert len(os.listdir('/proc/self/fd')) == before + 1
    files.close()
    files.close()
    assert len(os.listdir('/proc/self/fd')) == before


# JSON


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / 'x.json', {'b': 'é', 'a': [1]})
    assert (tmp_path / 'x.json').read_text(encoding='utf-8') == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'
