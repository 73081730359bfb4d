# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Weights of checkpoints, averaged or not, in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import torch

from composer_bema.averaging.parameters import first_names
from composer_bema.formats.huggingface import PREFIX

__all__ = ['load_weights']

# What PEFT puts into the names of an adapter's weights while they are in a model: the adapter's own.
_ADAPTER = '.default'
_REFERENCE = 'reference_model.'


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], what: str = 'the model') -> None:
    """Puts weights into a model: Composer's into its own or the Hugging Face model within, and those of a folder.

    Of a PEFT model the adapter's are enough.

    Args:
        model (Module): A Hugging Face model, one of Composer's that has it, or a PEFT model.
        weights (Mapping[str, Tensor]): Its weights by the names that they have in checkpoints.
        what (str): What the model is called in messages.

    Raises:
        ValueError: If they are another model's: one is missing, is too much, or has another shape.
    """
    state, first = model.state_dict(), first_names(model)
    own = {name.replace(_ADAPTER, ''): name for name in state} if hasattr(model, 'peft_config') else {}
    # What DPO compares with is in its checkpoints, and not in its policy.
    policy = {name: tensor for name, tensor in weights.items() if not name.startswith(_REFERENCE)}
    named = {_own_name(name, state, own) or name: tensor for name, tensor in policy.items()}
    # A Hugging Face folder has a tied parameter once, and an adapter's not its base.
    wanted = [name for name in state if not own or _ADAPTER in name]
    missing = next((name for name in wanted if name not in named and first.get(name, name) not in named), None)
    unexpected = next((name for name in named if name not in state), None)
    if missing or unexpected:
        lack = f"lack the tensor '{missing}'" if missing else f"have a tensor '{unexpected}' more"
        raise ValueError(f'The checkpoints are of another model than {what}: they {lack}.')
    for name, tensor in named.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"The tensor '{name}' has the shape {tuple(tensor.shape)} in the checkpoints, but "
                f'{tuple(state[name].shape)} in {what}.'
            )
    model.load_state_dict(named, strict=False)


def _own_name(name: str, state: Mapping[str, torch.Tensor], own: Mapping[str, str]) -> Optional[str]:
    """Returns what a model calls a weight, if it has it."""
    for candidate in (name, PREFIX + name, name.removeprefix(PREFIX)):
        if candidate in state:
            return candidate
        if candidate in own:
            return own[candidate]
    return None
