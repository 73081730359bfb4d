# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Sharded parameters: which part of each this rank holds under FSDP, and how the parts are saved and brought together.

FSDP2 cuts a parameter into rows, and FSDP1 a list of flattened ones into equal lengths. Either way a rank holds one
range of the parameter's elements in row-major order, so that ranges are all that the rest of the package knows of
sharding. What is saved as ranges can be loaded into any other cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedAlong
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ['FlatShard', 'Shard', 'gather', 'local_part', 'reshard', 'shards_by_id', 'share', 'sum_over_ranks']


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that this rank holds."""

    shape: torch.Size
    """The shape of the whole parameter."""
    start: int
    """The index of the first element held, in the flattened whole."""
    is_first_replica: bool
    """Whether no lower rank holds the same part: under hybrid sharding several do."""


class FlatShard(torch.Tensor):
    """This rank's range of a flattened tensor, as ``torch.distributed.checkpoint`` writes it and loads it in place.

    It implements ``torch.distributed._checkpointable._Checkpointable``, and nothing else can be computed with it.

    Args:
        local (torch.Tensor): The values held here, contiguous, of any shape. Their memory is shared.
        shard (Shard): Where they belong.
    """

    local: torch.Tensor
    shard: Shard

    @staticmethod
    def __new__(cls: type[FlatShard], local: torch.Tensor, shard: Shard) -> FlatShard:
        """Stands for the flattened whole: its size, its dtype, no memory."""
        size = (shard.shape.numel(),)
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=local.dtype, device=local.device)  # type: ignore

    def __init__(self, local: torch.Tensor, shard: Shard) -> None:
        super().__init__()
        self.local = local.detach().view(-1)
        self.shard = shard

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f'{func} cannot be computed with one shard of a tensor.')

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f'FlatShard({self.local.numel()} of {self.numel()} elements from {self.shard.start})'

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError('One shard of a tensor cannot be pickled: save it with torch.distributed.checkpoint.')

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.numel() and not self.local.numel():
            # An empty range at the place of another rank's would be taken for it.
            return []
        return [ChunkStorageMetadata(torch.Size([self.shard.start]), self.local.size())]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local


def shards_by_id(model: torch.nn.Module) -> dict[int, Shard]:
    """Returns the part held here of each parameter that FSDP manages, by the parameter's ``id``.

    Raises:
        ValueError: If parameters are sharded in a way that is not FSDP's.
    """
    shards = {}
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            shards.update(_flat_parameter_shards(module))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            shards[id(parameter)] = _dtensor_shard(name, parameter)
    return shards


def reshard(model: torch.nn.Module) -> None:
    """Frees the full parameters that FSDP has gathered for a forward pass and keeps for a backward pass.

    After an evaluation there was none. Until they are freed the model's parameters may not be the shards, and what is
    written to the shards would not be seen by the next forward pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                # Its reshard() would keep the root's, after a forward pass that raised.
                group._to_sharded()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy and _holds_full_parameters(handle):
                _reshard(module, handle, True)


def gather(shards: Mapping[Any, FlatShard]) -> dict[Any, torch.Tensor]:
    """Brings whole tensors together on rank 0, one after the other, in host memory.

    Every rank calls it with the same keys in the same order.

    Returns:
        dict[Any, torch.Tensor]: The whole tensors; empty on the other ranks.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    held = {key: (s.shard.start, s.local.numel() if s.shard.is_first_replica else 0) for key, s in shards.items()}
    held_by: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(held_by, held)
    wholes = {}
    for key, shard in shards.items():
        whole = torch.empty(shard.shard.shape, dtype=shard.dtype) if rank == 0 else None
        for source, ranges in enumerate(held_by):
            start, length = ranges[key]
            if length and whole is not None:
                part = shard.local if source == 0 else _receive(shard.local, length, source)
                whole.view(-1)[start : start + length] = part.cpu()
            elif length and rank == source:
                torch.distributed.send(shard.local.to(_wire(shard.local.device)), dst=0)
        if whole is not None:
            wholes[key] = whole
    return wholes


def local_part(saved: torch.Tensor, live: Optional[torch.Tensor], shard: Optional[Shard]) -> torch.Tensor:
    """Returns the values of a saved tensor that belong to ``live``, in its shape; other values if none do.

    Args:
        saved (torch.Tensor): The whole tensor, or this rank's `FlatShard` of it.
        live (torch.Tensor, optional): The local values that they are meant for.
        shard (Shard, optional): The part of the whole that ``live`` is.
    """
    if isinstance(saved, FlatShard):
        if live is not None and live.numel() == saved.local.numel():
            return saved.local.view_as(live)
        return saved.local
    if live is None or shard is None or saved.shape != shard.shape:
        return saved
    return saved.reshape(-1)[shard.start : shard.start + live.numel()].view(live.shape)


def share(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrites tensors with those of rank 0."""
    for tensor in tensors:
        sent = tensor.to(_wire(tensor.device))
        torch.distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


def sum_over_ranks(numbers: list[int] | list[float], device: torch.device) -> list[Any]:
    """Returns the sums over all ranks: of 64-bit integers modulo 2^64, or in fp64."""
    dtype = torch.int64 if all(isinstance(number, int) for number in numbers) else torch.float64
    total = torch.tensor(numbers, dtype=dtype, device=_wire(device))
    torch.distributed.all_reduce(total)
    return total.tolist()


def _flat_parameter_shards(module: FullyShardedDataParallel) -> Iterator[tuple[int, Shard]]:
    handle: Any = module._handle
    if handle is None:
        return
    flat = handle.flat_param
    if flat._params is None:
        raise ValueError('FSDP has fused the parameters, so that they cannot be averaged: set use_orig_params to True.')
    if not handle.uses_sharded_strategy:
        is_first_replica = torch.distributed.get_rank() == 0
    else:
        replicas = getattr(module, '_inter_node_pg', None)
        is_first_replica = replicas is None or replicas.rank() == 0
    for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
        yield id(parameter), Shard(shape, info.intra_param_start_idx if info.in_shard else 0, is_first_replica)


def _dtensor_shard(name: str, parameter: DTensor) -> Shard:
    cuts = [placement for placement in parameter.placements if not placement.is_replicate()]
    # By its type: FSDP over tensor parallelism places a subclass of it.
    if len(cuts) > 1 or any(type(cut) is not ShardedAlong or cut.dim != 0 for cut in cuts):
        raise ValueError(
            f"The parameter '{name}' is sharded as {parameter.placements}, which is not FSDP's way along the first "
            'axis: averaging does not support tensor parallelism.',
        )
    mesh, placements = parameter.device_mesh, parameter.placements
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    start = offsets[0] * parameter.shape[1:].numel() if cuts else 0
    coordinates = mesh.get_coordinate()
    assert coordinates is not None, 'a rank holds parameters of its own mesh only'
    is_first_replica = all(c == 0 for c, p in zip(coordinates, placements, strict=True) if p.is_replicate())
    return Shard(parameter.shape, start, is_first_replica)


def _holds_full_parameters(handle: Any) -> bool:
    if not hasattr(handle.flat_param, '_full_param_padded'):
        # FSDP makes room for full parameters in the first forward pass.
        return False
    return not handle.is_sharded(handle.flat_param) or not handle.needs_unshard()


def _receive(like: torch.Tensor, length: int, source: int) -> torch.Tensor:
    part = torch.empty(length, dtype=like.dtype, device=_wire(like.device))
    torch.distributed.recv(part, src=source)
    return part


def _wire(device: torch.device) -> torch.device:
    """Returns where a tensor of ``device`` has to be for the process group to send it."""
    supported = {device.type for device in torch.distributed.group.WORLD._device_types}  # type: ignore
    if device.type in supported:
        return device
    return torch.device('cuda', torch.cuda.current_device()) if 'cuda' in supported else torch.device('cpu')
