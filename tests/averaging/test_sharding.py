# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A shard knows its range of the whole, and is nothing but that range; `tests/distributed` has the ranks."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as ShardedAlong
from torch.distributed.tensor import distribute_tensor

from composer_bema.averaging.sharding import FlatShard, Shard, local_part, shards_by_id

WHOLE = torch.arange(12.0).view(4, 3)
SHARD = Shard(WHOLE.shape, start=3, is_first_replica=True)


def test_a_shard_of_a_saved_tensor_is_its_range():
    live = torch.zeros(2, 3)
    assert torch.equal(local_part(WHOLE, live, SHARD), WHOLE[1:3])
    assert torch.equal(local_part(FlatShard(WHOLE[1:3].clone(), SHARD), live, SHARD), WHOLE[1:3])
    # FSDP1 has it flattened, and perhaps nothing of it.
    assert torch.equal(local_part(WHOLE, torch.zeros(5), SHARD), WHOLE.view(-1)[3:8])
    assert local_part(WHOLE, torch.zeros(0), SHARD).shape == (0,)


def test_a_tensor_that_is_not_sharded_stays_whole():
    assert local_part(WHOLE, torch.zeros(4, 3), None) is WHOLE


def test_a_shard_shares_memory_and_has_the_size_of_the_flattened_whole():
    local = WHOLE[1:3].clone()
    shard = FlatShard(local, SHARD)
    assert shard.shape == (12,) and shard.local.data_ptr() == local.data_ptr()
    assert repr(shard) == 'FlatShard(6 of 12 elements from 3)'


@pytest.mark.parametrize('use', [torch.sum, copy.deepcopy, lambda shard: torch.save(shard, io.BytesIO())])
def test_a_shard_is_neither_computed_with_nor_pickled(use):
    with pytest.raises(TypeError, match='one shard of a tensor|One shard of a tensor'):
        use(FlatShard(WHOLE[1:3].clone(), SHARD))


@pytest.mark.usefixtures('one_rank')
@pytest.mark.parametrize('shape', [(4, 3), (0,)])
def test_a_shard_is_saved_and_loaded_in_place(tmp_path, shape):
    """An empty tensor too: its key has to be in the checkpoint."""
    values = torch.randn(shape)
    shard = Shard(values.shape, 0, is_first_replica=True)
    dcp.save({'a': FlatShard(values, shard)}, storage_writer=dcp.FileSystemWriter(tmp_path))
    loaded = torch.zeros(shape)
    dcp.load({'a': FlatShard(loaded, shard)}, storage_reader=dcp.FileSystemReader(tmp_path))
    assert torch.equal(loaded, values)


@pytest.mark.usefixtures('one_rank')
def test_tensor_parallelism_is_refused():
    model = torch.nn.Linear(4, 6)
    values = distribute_tensor(model.weight.data, init_device_mesh('cpu', (1,)), [ShardedAlong(1)])
    model.weight = torch.nn.Parameter(values)
    with pytest.raises(ValueError, match="'weight' is sharded as .*does not support tensor parallelism"):
        shards_by_id(model)
