# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a Composer checkpoint holds of the averages of a run, and where.

Under ``state/callbacks/AveragingCheckpoint`` there is an entry for each average, by its class's name::

    header             a checksum, and JSON: settings, clocks, counters, the tensors' shapes and digests
    buffers            theta_0, ema, bema, ...: each a dict of tensors by canonical name
    training_weights   a dict of tensors, while the checkpoint's model holds the average

and beside them ``model_holds``, the name of the average that the model holds, or ``training``. What the model holds of
an average bit for bit is not repeated in its buffers, but has its digest.

In a monolithic checkpoint tensors are whole. In a sharded one they are tensors of torch's distributed checkpoints,
those of sharded parameters flattened, so that any sharding can read its range of them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from composer_bema.averaging.parameters import local_tensor, named_tensors, parameter_shards
from composer_bema.averaging.saving import BUFFERS, TRAINING_WEIGHTS
from composer_bema.averaging.sharding import FlatShard, gather

__all__ = [
    'ENTRY',
    'ENTRY_PATH',
    'HEADER',
    'load_sharded_entries',
    'pack_entry',
    'read_header',
    'unpack_entry',
]

ENTRY = 'AveragingCheckpoint'
ENTRY_PATH = ('state', 'callbacks', ENTRY)
HEADER = 'header'


def pack_entry(saved: Mapping[str, Any], *, as_shards: bool) -> dict[str, Any]:
    """Returns an average's state as a checkpoint holds it.

    Args:
        saved (Mapping[str, Any]): The state: plain values, ``buffers`` and perhaps ``training_weights``.
        as_shards (bool): Whether the checkpoint is sharded. If not, every rank has to call this for a sharded model,
            and rank 0 alone gets the tensors.
    """
    groups = {**saved[BUFFERS], TRAINING_WEIGHTS: saved.get(TRAINING_WEIGHTS, {})}
    tensors = {(name, n): tensor for name, group in groups.items() for n, tensor in group.items()}
    plain = {name: value for name, value in saved.items() if name not in (BUFFERS, TRAINING_WEIGHTS)}
    packed: dict[str, Any] = {HEADER: _header(plain), BUFFERS: {}}
    for (name, n), tensor in (_written_here(tensors) if as_shards else _gathered(tensors)).items():
        place = packed if name == TRAINING_WEIGHTS else packed[BUFFERS]
        place.setdefault(name, {})[n] = tensor
    return packed


def unpack_entry(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state that :func:`pack_entry` was given.

    Raises:
        ValueError: If the header is damaged.
    """
    tensors = {name: value for name, value in packed.items() if name != HEADER}
    return {BUFFERS: {}, **read_header(packed[HEADER]), **tensors}


def read_header(header: str) -> dict[str, Any]:
    """Returns the plain values of an entry.

    Raises:
        ValueError: If they are not those that were saved.
    """
    checksum, _, text = header.partition(' ')
    if checksum != _checksum(text):
        raise ValueError('its header is damaged.')
    return json.loads(text)


def load_sharded_entries(reader: dcp.StorageReader, model: torch.nn.Module) -> dict[str, Any]:
    """Reads all that a sharded checkpoint has under `ENTRY`: of tensors that the model shards, this rank's shards.

    Every rank has to call it.

    Args:
        reader (StorageReader): The checkpoint.
        model (torch.nn.Module): The model, sharded as it is to be trained.

    Returns:
        dict[str, Any]: What the callback has saved; empty if the checkpoint was written without it.
    """
    metadata = reader.read_metadata()
    named, shards = named_tensors(model), parameter_shards(model)
    entries: dict[str, Any] = {}
    for key, path in (metadata.planner_data or {}).items():
        if tuple(path[: len(ENTRY_PATH)]) != ENTRY_PATH:
            continue
        place = entries
        *parents, n = path[len(ENTRY_PATH) :]
        for parent in parents:
            place = place.setdefault(parent, {})
        stored = metadata.state_dict_metadata[key]
        if isinstance(stored, BytesStorageMetadata):
            place[n] = None
        elif n in shards:
            # In host memory: beside the model and its average there may be no room.
            memory = torch.empty(local_tensor(named[n]).numel(), dtype=stored.properties.dtype)
            place[n] = FlatShard(memory, shards[n])
        else:
            place[n] = torch.empty(stored.size, dtype=stored.properties.dtype)
    if entries:
        dcp.load({'state': {'callbacks': {ENTRY: entries}}}, storage_reader=reader)
    return entries


def _written_here(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Returns shards, and on rank 0 whole tensors too: each rank has its own, and the digests are of rank 0's."""
    is_first_rank = torch.distributed.get_rank() == 0
    return {key: tensor for key, tensor in tensors.items() if is_first_rank or isinstance(tensor, FlatShard)}


def _gathered(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Returns the tensors, with whole ones in the place of shards; on ranks that get none without them."""
    shards = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, FlatShard)}
    wholes = {**tensors, **gather(shards)} if shards else tensors
    return {key: tensor for key, tensor in wholes.items() if not isinstance(tensor, FlatShard)}


def _header(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, default=_number)
    return f'{_checksum(text)} {text}'


def _checksum(text: str) -> str:
    return f'{zlib.crc32(text.encode()):08x}'


def _number(value: Any) -> Any:
    """Numbers of NumPy are no JSON."""
    return value.item()
