# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What an average looks like when it is saved, and how its tensors are checked and brought home to a model's shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from composer_bema.averaging.digests import digests_of
from composer_bema.averaging.parameters import local_tensor, named_tensors, parameter_shards
from composer_bema.averaging.sharding import FlatShard, Shard, local_part

__all__ = [
    'BUFFERS',
    'DIGESTS',
    'LAYOUT',
    'MODEL_HOLDS',
    'SHAPES',
    'TRAINING_WEIGHTS',
    'TensorGroups',
    'flat_shards',
    'loaded_tensors',
    'shapes_of',
]

# The keys of a saved state, beside the counters that go by their attributes' names.
BUFFERS = 'buffers'
DIGESTS = 'digests'
LAYOUT = 'layout'
MODEL_HOLDS = 'model_holds'
SHAPES = 'shapes'
TRAINING_WEIGHTS = 'training_weights'

# Tensors by canonical name, by the name of the buffer that they make up, or as `TRAINING_WEIGHTS`.
TensorGroups = dict[str, dict[str, torch.Tensor]]


def flat_shards(tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
    """Returns local tensors as they are saved: those that are shards as `FlatShard`."""
    return {n: FlatShard(tensor, shards[n]) if n in shards else tensor for n, tensor in tensors.items()}


def shapes_of(tensors: TensorGroups) -> dict[str, list[int]]:
    """Returns the shapes of tensors, of the whole ones if they are sharded, by canonical name."""
    named = {n: tensor for group in tensors.values() for n, tensor in group.items()}
    return {n: list(t.shard.shape if isinstance(t, FlatShard) else t.shape) for n, t in named.items()}


def loaded_tensors(state: Mapping[str, Any], model: torch.nn.Module) -> TensorGroups:
    """Returns the values of a saved state that belong to this rank, checked against the model and their digests.

    Args:
        state (Mapping[str, Any]): The saved state, with tensors that are whole or this rank's `FlatShard`.
        model (torch.nn.Module): The model, holding the weights that were saved beside the state.

    Raises:
        ValueError: If a name is missing or unexpected, a shape differs, or values are not those that were saved.
    """
    named, shards = named_tensors(model), parameter_shards(model)
    live = {n: local_tensor(tensor) for n, tensor in named.items()}
    saved = _completed(state, flat_shards(live, shards))
    _check_shapes({**shapes_of(saved), **state[SHAPES]}, shapes_of({'live': flat_shards(live, shards)}))
    local = {
        name: {n: local_part(tensor, live.get(n), shards.get(n)) for n, tensor in group.items()}
        for name, group in saved.items()
    }
    _check_digests(saved, state[DIGESTS])
    return local


def _completed(state: Mapping[str, Any], live: Mapping[str, torch.Tensor]) -> TensorGroups:
    """Returns the tensors of a saved state, with those that were left out since the model holds them."""
    saved = {name: dict(group) for name, group in state[BUFFERS].items()}
    model_holds_average = state[MODEL_HOLDS] == 'average'
    if model_holds_average:
        saved[TRAINING_WEIGHTS] = dict(state[TRAINING_WEIGHTS])
    for name, digests in state[DIGESTS].items():
        group = saved.setdefault(name, {})
        # In the saved order, which is that of every rank.
        for n in [n for n in digests if n not in group]:
            if not model_holds_average:
                raise ValueError(f"The saved average lacks the values of '{n}' in '{name}'.")
            if n not in live:
                raise ValueError(f"The average has a tensor '{n}' that the model lacks.")
            group[n] = live[n]
    return saved


def _check_shapes(saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> None:
    """Checks whole shapes, so that all ranks come to the same verdict."""
    for n, shape in saved.items():
        if n not in wanted:
            raise ValueError(f"The average has a tensor '{n}' that the model lacks.")
        if shape != wanted[n]:
            raise ValueError(
                f"The average of '{n}' has the shape {tuple(shape)}, but the model's has {tuple(wanted[n])}.",
            )


def _check_digests(saved: TensorGroups, digests: Mapping[str, Mapping[str, int]]) -> None:
    for name, found in digests_of(saved).items():
        for n, value in found.items():
            if digests.get(name, {}).get(n) != value:
                raise ValueError(
                    f"The values of '{n}' in '{name}' are not those that were saved: the file is damaged, or the model "
                    'does not hold the weights that were saved with the average.',
                )
