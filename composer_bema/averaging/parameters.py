# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Canonical names and local shards of a model's parameters and module buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from composer_bema.averaging.sharding import Shard, reshard, shards_by_id

__all__ = [
    'canonical_names',
    'copy_weights',
    'first_names',
    'keep_out_of_averages',
    'local_tensor',
    'matching_tensors',
    'names_kept_out',
    'named_parameters',
    'named_persistent_buffers',
    'named_tensors',
    'parameter_shards',
]

# Path components that FSDP1, torch.compile and activation checkpointing put into names.
_WRAPPERS = frozenset({'_fsdp_wrapped_module', '_orig_mod', '_checkpoint_wrapped_module'})
_KEPT_OUT = '_is_kept_out_of_averages'


def canonical_names(model: torch.nn.Module, names: list[str]) -> list[str]:
    """Returns names as the unwrapped model would give them.

    ``module.`` is dropped only where torch's data parallelism put it: elsewhere it is a fair name.
    """
    ddp_prefixes = [
        f'{name}.module.' if name else 'module.'
        for name, module in model.named_modules()
        if isinstance(module, (DistributedDataParallel, DataParallel))
    ]
    # The innermost wrapper first, so that dropping one prefix leaves the outer ones as they were.
    ddp_prefixes.sort(key=len, reverse=True)
    return [_canonical(name, ddp_prefixes) for name in names]


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns every parameter, trainable or not, by canonical name; tied parameters appear once.

    Of a model under FSDP they are the shards, whatever the last forward pass has left gathered.
    """
    reshard(model)
    return _by_canonical_name(model, dict(model.named_parameters()))


def named_persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the module buffers that belong to the model's state, by canonical name.

    Non-persistent buffers (rotary frequencies, attention masks) are caches of the module and are left alone.
    """
    return _by_canonical_name(model, _persistent_buffers(model))


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters and persistent module buffers of a model by canonical name."""
    reshard(model)
    return _by_canonical_name(model, {**dict(model.named_parameters()), **_persistent_buffers(model)})


def parameter_shards(model: torch.nn.Module) -> dict[str, Shard]:
    """Returns the part held here of each parameter that FSDP manages, by canonical name; others are whole.

    Raises:
        ValueError: If parameters are sharded in a way that is not FSDP's.
    """
    shards = shards_by_id(model)
    return {n: shards[id(p)] for n, p in named_parameters(model).items() if id(p) in shards}


def keep_out_of_averages(module: torch.nn.Module) -> None:
    """Marks a submodule whose buffers are no statistics of the training, such as a frozen reference model."""
    setattr(module, _KEPT_OUT, True)


def names_kept_out(model: torch.nn.Module) -> frozenset[str]:
    """Returns the canonical names of the module buffers in marked submodules."""
    marked = [module for module in model.modules() if getattr(module, _KEPT_OUT, False)]
    kept_out = {id(buffer) for module in marked for buffer in module.buffers()}
    return frozenset(n for n, buffer in named_persistent_buffers(model).items() if id(buffer) in kept_out)


def matching_tensors(
    wanted: Mapping[str, torch.Tensor],
    named: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Returns the local tensors in ``named`` of the names and shapes in ``wanted``.

    Raises:
        ValueError: If a name is missing or a shape differs.
    """
    found = {}
    for n, tensor in wanted.items():
        if n not in named:
            raise ValueError(f"The average has a tensor '{n}' that the model lacks.")
        found[n] = local_tensor(named[n])
        if found[n].shape != tensor.shape:
            raise ValueError(
                f"The average of '{n}' has the shape {tuple(tensor.shape)}, but the model's has "
                f'{tuple(found[n].shape)}.',
            )
    return found


def first_names(model: torch.nn.Module) -> dict[str, str]:
    """Maps every canonical name of a parameter or module buffer, tied or not, to the one that it is averaged under."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    names = canonical_names(model, [name for name, _ in tensors])
    return {name: first.setdefault(id(tensor), name) for name, (_, tensor) in zip(names, tensors, strict=True)}


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Overwrites the parameters and persistent module buffers of ``target`` with those of ``source``.

    Raises:
        ValueError: If ``target`` lacks one of them or has it in another shape. Nothing is changed then.
    """
    sources, targets = (
        {name: local_tensor(tensor) for name, tensor in named_tensors(model).items()} for model in (source, target)
    )
    for name, tensor in sources.items():
        if name not in targets or targets[name].shape != tensor.shape:
            raise ValueError(f"The model to copy weights to has no tensor '{name}' of the shape {tuple(tensor.shape)}.")
    for name, tensor in sources.items():
        targets[name].copy_(tensor)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's values, sharing memory with ``tensor`` and detached from autograd."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.detach()


def _canonical(name: str, ddp_prefixes: list[str]) -> str:
    for prefix in ddp_prefixes:
        if name.startswith(prefix):
            name = prefix.removesuffix('module.') + name[len(prefix) :]
    parts = name.split('.')
    return name if _WRAPPERS.isdisjoint(parts) else '.'.join(part for part in parts if part not in _WRAPPERS)


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    caches = {
        f'{prefix}.{name}' if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in caches}


def _by_canonical_name(model: torch.nn.Module, tensors: dict) -> dict:
    return dict(zip(canonical_names(model, list(tensors)), tensors.values(), strict=True))
