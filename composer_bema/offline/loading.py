# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Weights of checkpoints, averaged or not, in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch

from composer_bema.averaging.parameters import first_names
from composer_bema.formats.huggingface import PREFIX

__all__ = ['load_weights']

_REFERENCE_MODEL, _REFERENCE_ADAPTER = 'reference_model.', '.reference.'


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
    is_adapted = hasattr(model, 'peft_config')
    adapter, needed = _adapter_names(model, state) if is_adapted else ({}, set(state))
    # What DPO compares with is in its checkpoints, and not in its policy.
    policy = {name: tensor for name, tensor in weights.items() if not _is_reference(name, is_adapted)}
    named = {_own_name(name, state, adapter) or name: tensor for name, tensor in policy.items()}
    # A Hugging Face folder has a tied parameter once, and an adapter's not its base.
    missing = next(
        (name for name in state if name in needed and name not in named and first.get(name, name) not in named), None
    )
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


def _adapter_names(model: Any, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], set[str]]:
    """Returns what a PEFT model calls the tensors of its adapter's folder, and those of them that every folder has.

    PEFT itself says how it writes them: DoRA's magnitudes, and modules that are trained whole, have names of their own.
    """
    from peft import get_peft_model_state_dict

    own = {id(tensor): name for name, tensor in state.items()}

    def written(save_embedding_layers: Any) -> dict[str, str]:
        tensors = get_peft_model_state_dict(
            model, state, model.active_adapter, save_embedding_layers=save_embedding_layers
        )
        return {name: own[id(tensor)] for name, tensor in tensors.items() if id(tensor) in own}

    # Embeddings are there or not, as PEFT saw fit.
    return written(save_embedding_layers=True), set(written(save_embedding_layers=False).values())


def _is_reference(name: str, is_adapted: bool) -> bool:
    return name.startswith(_REFERENCE_MODEL) or (is_adapted and _REFERENCE_ADAPTER in f'{name}.')


def _own_name(name: str, state: Mapping[str, torch.Tensor], adapter: Mapping[str, str]) -> Optional[str]:
    """Returns what a model calls a weight, if it has it."""
    for candidate in (name, PREFIX + name, name.removeprefix(PREFIX)):
        if candidate in state:
            return candidate
        if candidate in adapter:
            return adapter[candidate]
    return None
