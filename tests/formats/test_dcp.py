# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Folders of torch's distributed checkpoints: what torch has written is read back, and contradictions are noticed."""

import dataclasses
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from composer_bema.formats import dcp as dcp_format
from composer_bema.formats.dcp import plain, read_folder, read_model
from tests.formats.runs import InTwo


@pytest.fixture
def write(tmp_path):
    def write(nest):
        dcp.save(nest, storage_writer=dcp.FileSystemWriter(tmp_path / 'x'))
        return tmp_path / 'x'

    return write


class Cut(InTwo):
    """A tensor that is saved in the parts given, each by the place of its first value and its shape."""

    parts: dict[tuple[int, ...], tuple[int, ...]]

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.parts.items()]

    def __get_tensor_shard__(self, index):
        assert index.offset is not None
        sizes = self.parts[tuple(index.offset)]
        return self.whole[tuple(slice(o, o + s) for o, s in zip(index.offset, sizes, strict=True))]


def cut(whole, *parts):
    tensor = Cut(whole)
    assert isinstance(tensor, Cut)
    tensor.parts = dict(parts)
    return tensor


def joined(lazy, size):
    pieces = [piece.clone() for piece in lazy.pieces(size)]
    assert all(piece.numel() == size for piece in pieces[:-1])
    assert len(pieces) == max(1, -(-lazy.shape.numel() // size))
    assert all((piece.dim(), piece.dtype) == (1, lazy.dtype) for piece in pieces)
    return torch.cat(pieces)


def change(folder, how):
    with (folder / '.metadata').open('rb') as file:
        metadata = pickle.load(file)
    how(metadata)
    (folder / '.metadata').write_bytes(pickle.dumps(metadata))


def first_part(metadata):
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize('shape', [(), (0,), (1,), (5,), (5, 3), (3, 2, 4)])
def test_tensors_come_back(write, shape, dtype):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    nest = {'whole': tensor, 'a.b': {'c.d': tensor.clone()}}
    if shape and shape[0] > 1:
        nest['halves'] = InTwo(tensor)
    read = read_folder(write(nest))
    for lazy in (read['whole'], read['a.b']['c.d'], read.get('halves', read['whole'])):
        assert (lazy.shape, lazy.dtype) == (tensor.shape, dtype)
        assert torch.equal(lazy.read(), tensor)
        for size in (1, 2, 7, 1000):
            assert torch.equal(joined(lazy, size), tensor.reshape(-1))


def test_values_come_back_but_for_what_is_empty(write):
    values = {
        'a': 1,
        'b': 'text',
        'c': None,
        'd': [1, 2.5, [True]],
        'e': [{'f': 1}, {'f': [2]}],
        'g': [],
        'h': b'bytes',
    }
    assert plain(read_folder(write({'values': {**values, 'empty': {}}}))['values']) == values


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        (lambda m: setattr(m, 'planner_data', None), 'its .metadata contradicts itself'),
        (lambda m: m.planner_data.update(a=('b',)), 'its .metadata contradicts itself'),
        (lambda m: m.planner_data.pop('a'), 'its .metadata contradicts itself'),
        (lambda m: setattr(m, 'storage_data', None), 'does not say where its tensors are'),
        (lambda m: m.storage_data.clear(), 'its .metadata contradicts itself'),
        (
            lambda m: setattr(first_part(m), 'relative_path', '../x'),
            r"the file '\.\./x', which is",
        ),
        (lambda m: setattr(first_part(m), 'relative_path', '/etc/passwd'), "the file '/etc/passwd', which is not"),
        (lambda m: setattr(first_part(m), 'relative_path', '..'), r"the file '\.\.', which is not in the folder"),
        (lambda m: setattr(first_part(m), 'offset', -1), 'which is not in the folder'),
        (
            lambda m: setattr(first_part(m), 'transform_descriptors', ['zip']),
            r'through \[.zip.\]',
        ),
        (lambda m: m.state_dict_metadata['a'].chunks.clear(), "has 'a' in parts that do not make up the whole"),
        (
            lambda m: m.state_dict_metadata['a'].chunks.append(ChunkStorageMetadata(torch.Size([9]), torch.Size([1]))),
            "has 'a' in parts that do not make up the whole",
        ),
    ],
)
def test_metadata_that_contradicts_itself(write, how, message):
    folder = write({'a': torch.ones(3), 'b': 1})
    change(folder, how)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    ('parts', 'moved'),
    [
        ([((0,), (4,)), ((4,), (4,))], {1: (0,)}),
        ([((0,), (4,)), ((4,), (4,))], {1: (3,)}),
        ([((0,), (4,)), ((8,), (0,)), ((4,), (4,))], {2: (2,)}),
        ([((0, 0), (4, 1)), ((0, 1), (4, 1))], {1: (0, 0)}),
        # A corner of each covers one of another, and one is missing.
        ([((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((2, 2), (2, 2))], {3: (1, 1)}),
    ],
)
def test_parts_that_overlap_do_not_make_up_the_whole(write, parts, moved):
    """Though their sizes do: values would be read of memory that nothing was written to."""
    shape = [max(o[axis] + s[axis] for o, s in parts) for axis in range(len(parts[0][0]))]
    folder = write({'a': cut(torch.arange(float(torch.Size(shape).numel())).view(shape), *parts)})
    assert read_folder(folder)['a'].read().sum() > 0

    def move(metadata):
        for index, offsets in moved.items():
            chunk = metadata.state_dict_metadata['a'].chunks[index]
            place = next(place for place in metadata.storage_data if place.offset == chunk.offsets)
            chunk.offsets = torch.Size(offsets)
            moved_place = dataclasses.replace(place, offset=chunk.offsets)
            metadata.storage_data[moved_place] = metadata.storage_data.pop(place)

    change(folder, move)
    with pytest.raises(ValueError, match="^its .metadata has 'a' in parts that do not make up the whole$"):
        read_folder(folder)


def test_metadata_of_another_kind(tmp_path):
    (tmp_path / '.metadata').write_bytes(pickle.dumps({'a': 1}))
    with pytest.raises(ValueError, match='its .metadata is of another kind'):
        read_folder(tmp_path)


def test_a_part_that_is_another_is_refused(write):
    """Two tensors of one dtype and different shapes change places."""
    folder = write({'a': torch.ones(3), 'b': torch.ones(2)})

    def exchange(metadata):
        a, b = metadata.storage_data.values()
        a.__dict__, b.__dict__ = b.__dict__, a.__dict__

    change(folder, exchange)
    lazy = read_folder(folder)['a']
    for read in (lazy.read, lambda: next(lazy.pieces(1))):
        with pytest.raises(ValueError, match=r"__0_0\.distcp' has something else where 'a' should be"):
            read()


@pytest.mark.parametrize('place', range(-150, 0, 10))
def test_a_flipped_bit_in_any_tensor_is_noticed(write, place):
    folder = write({'a': torch.arange(20.0)})
    (file,) = folder.glob('*.distcp')
    content = file.read_bytes()
    begin = content.index(torch.arange(20.0).numpy().tobytes())
    place = begin + 80 * (place + 150) // 150
    file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    lazy = read_folder(folder)['a']
    for read in (lazy.read, lambda: joined(lazy, 20), lambda: joined(lazy, 7)):
        with pytest.raises(ValueError, match=r"__0_0\.distcp' is damaged at byte 0 \(its records are damaged: Bad CRC"):
            read()


# Piece by piece


@pytest.fixture(scope='module')
def in_many_parts(tmp_path_factory):
    """Tensors cut in all ways, and what they are."""
    tensor = torch.randn(11, 3)
    flat = torch.arange(50, dtype=torch.int16)
    cuts = {
        'whole': (tensor, tensor),
        'halves': (InTwo(tensor), tensor),
        'rows': (cut(tensor, ((0, 0), (1, 3)), ((1, 0), (7, 3)), ((8, 0), (3, 3))), tensor),
        'some empty': (cut(tensor, ((0, 0), (6, 3)), ((6, 0), (5, 3)), ((11, 0), (0, 3))), tensor),
        'not in order': (cut(flat, ((30,), (20,)), ((0,), (13,)), ((13,), (17,))), flat),
        'flat': (InTwo(flat), flat),
        'columns': (cut(tensor, ((0, 0), (11, 1)), ((0, 1), (11, 2))), tensor),
        'boxes': (cut(tensor, ((0, 0), (4, 3)), ((4, 0), (7, 2)), ((4, 2), (7, 1))), tensor),
        'boxes and nothing': (
            cut(tensor, ((0, 0), (4, 3)), ((11, 1), (0, 2)), ((4, 0), (7, 2)), ((4, 2), (7, 1))),
            tensor,
        ),
        'transposed': (tensor.t(), tensor.t()),
        'rows of transposed': (InTwo(tensor.t()), tensor.t()),
        'conjugate': (torch.randn(7, dtype=torch.cfloat).conj(), None),
        '8 bits': (tensor.to(torch.float8_e4m3fn).view(torch.float8_e4m3fn), None),
    }
    folder = tmp_path_factory.mktemp('parts')
    nest = {name: saved for name, (saved, _) in cuts.items()}
    dcp.save(nest, storage_writer=dcp.FileSystemWriter(folder))
    return folder, {name: saved if whole is None else whole for name, (saved, whole) in cuts.items()}


@given(data=st.data(), size=st.integers(1, 60))
def test_pieces_are_those_of_the_whole_wherever_it_is_cut(in_many_parts, data, size):
    folder, tensors = in_many_parts
    name = data.draw(st.sampled_from(sorted(tensors)))
    lazy = read_folder(folder)[name]
    expected = tensors[name].reshape(-1)
    for values in (joined(lazy, size), lazy.read().reshape(-1)):
        assert values.dtype == expected.dtype
        assert bytes_of(values) == bytes_of(expected)


def bytes_of(tensor):
    return tensor.resolve_conj().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize('name', ['whole', 'rows', 'some empty', 'not in order', 'flat', '8 bits'])
def test_no_more_than_a_piece_is_read_at_a_time(in_many_parts, name, monkeypatch):
    """Apart from the directory and the pickle of a part, which are small whatever its size."""
    folder, tensors = in_many_parts
    lazy = read_folder(folder)[name]
    reads = []

    class Watched(io.FileIO):
        def readinto(self, buffer):
            reads.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr('composer_bema.formats.stored_parts.load_archive', None)
    monkeypatch.setattr(dcp_format, '_assemble', None)
    original = Path.open
    monkeypatch.setattr(Path, 'open', lambda path, mode: Watched(path, mode) if mode == 'rb' else original(path, mode))
    assert torch.equal(joined(lazy, 5).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))
    assert max(reads) == 5 * lazy.dtype.itemsize
    assert sum(reads) == tensors[name].nbytes


def test_no_file_stays_open(in_many_parts):
    folder, _ = in_many_parts
    before = len(os.listdir('/proc/self/fd'))
    begun = [lazy.pieces(2) for lazy in read_folder(folder).values()]
    for pieces in begun:
        next(pieces)
    assert len(os.listdir('/proc/self/fd')) == before


def test_threads_do_not_disturb_each_other(in_many_parts):
    folder, tensors = in_many_parts
    nest = read_folder(folder)
    names = sorted(tensors) * 20
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda name: bytes_of(joined(nest[name], 3)), names))
    assert found == [bytes_of(tensors[name].reshape(-1)) for name in names]


def test_a_damaged_value_is_noticed_before_the_last_piece_of_its_part(write):
    folder = write({'a': InTwo(torch.arange(20.0))})
    (file,) = folder.glob('*.distcp')
    content = file.read_bytes()
    place = content.index(torch.arange(10.0).numpy().tobytes())
    file.write_bytes(content[:place] + b'\1' + content[place + 1 :])
    pieces = read_folder(folder)['a'].pieces(4)
    assert [len(next(pieces)) for _ in range(2)] == [4, 4]
    with pytest.raises(ValueError, match=r'is damaged at byte 0 \(its records are damaged: Bad CRC-32'):
        next(pieces)


@pytest.mark.parametrize('shape', [(), (20,), (5, 4)])
def test_checkpoints_without_checksums_are_read(write, shape):
    tensor = torch.ones(shape)
    torch.serialization.set_crc32_options(False)
    try:
        folder = write({'a': tensor})
    finally:
        torch.serialization.set_crc32_options(True)
    (file,) = folder.glob('*.distcp')
    content = file.read_bytes()
    # Nothing is there to tell.
    begin = content.index(tensor.numpy().tobytes())
    file.write_bytes(content[:begin] + torch.tensor([2.0]).numpy().tobytes() + content[begin + 4 :])
    lazy = read_folder(folder)['a']
    assert joined(lazy, 3).tolist() == lazy.read().reshape(-1).tolist() == [2.0, *[1.0] * (tensor.numel() - 1)]
    # It is the bytes of this machine that are passed on.
    file.write_bytes(content.replace(b'little', b'middle'))
    for read in (lazy.read, lambda: next(lazy.pieces(3))):
        with pytest.raises(ValueError, match='Unknown endianness type'):
            read()


def test_a_part_of_another_dtype_is_refused(write):
    folder = write({'a': torch.ones(3)})
    change(folder, lambda m: setattr(m.state_dict_metadata['a'].properties, 'dtype', torch.int32))
    lazy = read_folder(folder)['a']
    for read in (lazy.read, lambda: next(lazy.pieces(1))):
        with pytest.raises(ValueError, match="has something else where 'a' should be"):
            read()


@pytest.mark.parametrize('kept', [0, 10, -600, -1])
def test_a_file_that_is_cut(write, kept):
    folder = write({'a': torch.ones(1000)})
    lazy = read_folder(folder)['a']
    (file,) = folder.glob('*.distcp')
    content = file.read_bytes()
    pieces = lazy.pieces(100)
    next(pieces)
    file.write_bytes(content[:kept])
    for read in (lazy.read, lambda: next(lazy.pieces(100))):
        with pytest.raises(ValueError, match='is damaged at byte 0 .*its end is missing'):
            read()
    if kept >= 0:
        # It was whole when the reading began.
        with pytest.raises(ValueError, match=r'is damaged at byte 0 \(its end is missing\); use another checkpoint'):
            list(pieces)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        next(lazy.pieces(100))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(write, tmp_path):
    folder = write({'a': torch.ones(3)})
    (file,) = folder.glob('*.distcp')
    with file.open('wb') as opened:
        torch.save({'a': torch.ones(3), 'b': Evil(tmp_path / 'made')}, opened)
    change(folder, lambda m: setattr(first_part(m), 'length', file.stat().st_size))
    lazy = read_folder(folder)['a']
    for read in (lazy.read, lambda: next(lazy.pieces(1))):
        with pytest.raises(ValueError, match='it cannot be unpickled'):
            read()
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('nest', [lambda state: state, lambda state: {'model': state, 'optimizer': {'step': 3}}])
def test_models_of_other_trainers(write, nest):
    state = {'a.b': torch.ones(3), 'c': torch.zeros(2, 2)}
    tensors = read_model(write(nest(state)))
    assert {name: tensor.read().tolist() for name, tensor in tensors.items()} == {
        'a.b': [1, 1, 1],
        'c': [[0, 0], [0, 0]],
    }


@pytest.mark.parametrize('nest', [{'app': {'model': {'a': torch.ones(2)}}}, {'weights': {'a': torch.ones(2)}, 'b': 1}])
def test_what_may_be_an_optimizer_is_not_taken_for_a_model(write, nest):
    with pytest.raises(ValueError, match=r'it holds \w+.*, and no model or model_state_dict or state_dict'):
        read_model(write(nest))
