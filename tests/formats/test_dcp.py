# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Folders of torch's distributed checkpoints: what torch has written is read back, and contradictions are noticed."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from composer_bema.formats.dcp import plain, read_folder
from tests.formats.runs import InTwo


@pytest.fixture
def write(tmp_path):
    def write(nest):
        dcp.save(nest, storage_writer=dcp.FileSystemWriter(tmp_path / 'x'), no_dist=True)
        return tmp_path / 'x'

    return write


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
    with pytest.raises(ValueError, match=r"__0_0\.distcp' has something else where 'a' should be"):
        read_folder(folder)['a'].read()


@pytest.mark.parametrize('place', range(-150, 0, 10))
def test_a_flipped_bit_in_any_tensor_is_noticed(write, place):
    folder = write({'a': torch.arange(20.0)})
    (file,) = folder.glob('*.distcp')
    content = file.read_bytes()
    begin = content.index(torch.arange(20.0).numpy().tobytes())
    place = begin + 80 * (place + 150) // 150
    file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"__0_0\.distcp' is damaged at byte 0 \(its records are damaged: Bad CRC-32"):
        read_folder(folder)['a'].read()
