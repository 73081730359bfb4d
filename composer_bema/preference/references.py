# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen reference of a policy: a model of its own, or a second adapter on the base that they share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from composer_bema.averaging.parameters import (
    first_names,
    keep_out_of_averages,
    local_tensor,
    named_persistent_buffers,
    named_tensors,
    parameter_shards,
)

__all__ = ['ADAPTER', 'add_reference_adapter', 'copy_to_reference', 'frozen_copy', 'reference_adapter']

ADAPTER = 'reference'


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a copy of a model that is neither trained nor averaged."""
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    keep_out_of_averages(reference)
    return reference


def add_reference_adapter(model: Any) -> dict[str, str]:
    """Adds a frozen copy of the adapter that a PEFT model trains.

    Returns:
        dict[str, str]: The parameter of the copy for each parameter that is trained.

    Raises:
        ValueError: If the model trains what is shared with the reference, or has an adapter of the reference's name.
    """
    if ADAPTER in model.peft_config:
        raise ValueError(
            f"The model has an adapter named '{ADAPTER}', as DPO calls the one that it adds: give it another name.",
        )
    policy_adapter = model.active_adapter
    config = copy.deepcopy(model.peft_config[policy_adapter])
    bias = getattr(config, 'bias', 'none')
    if bias != 'none':
        raise ValueError(
            f"With bias='{bias}' the adapter trains biases that policy and reference share: set it to 'none' in the "
            'peft_config.',
        )
    config.inference_mode = True
    # Its values are copied: some initialisations (PiSSA, OLoRA) would take them out of the base, a second time.
    config.init_lora_weights = True
    # Before PEFT freezes all that is no adapter.
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.add_adapter(ADAPTER, config)
    parameters = dict(model.named_parameters())
    names = {}
    for name in trained:
        names[name] = '.'.join(ADAPTER if part == policy_adapter else part for part in name.split('.'))
        if names[name] == name or names[name] not in parameters:
            raise ValueError(
                f"The parameter '{name}' is trained, but policy and reference share it: with an adapter, DPO can train "
                'nothing else.',
            )
        parameters[names[name]].requires_grad_(False)
        parameters[names[name]].data.copy_(parameters[name].data)
    return names


@contextlib.contextmanager
def reference_adapter(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Holds the reference's adapter in a PEFT model, without dropout, in the place of the policy's.

    PEFT's own ``set_adapter`` would make the reference trainable.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapted: list[Any] = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = [module._active_adapter for module in adapted]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    for module in adapted:
        module._active_adapter = [ADAPTER]
    try:
        yield model
    finally:
        for module, adapter in zip(adapted, active, strict=True):
            module._active_adapter = adapter
        for module in was_training:
            module.training = True


@torch.no_grad()
def copy_to_reference(model: torch.nn.Module, names: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> None:
    """Overwrites the reference in a model, rounded once to its dtypes.

    Args:
        model (torch.nn.Module): The model that holds policy and reference, under any wrapping.
        names (Mapping[str, str]): The reference's tensor for each of the policy's, by canonical name.
        weights (Mapping[str, torch.Tensor]): Values for tensors of the policy, this rank's of a sharded model.

    Raises:
        ValueError: If the policy has no tensor of a name, or ranks hold other parts of the reference than of the
            policy. Nothing is changed then.
    """
    tensors, shards, first = named_tensors(model), parameter_shards(model), first_names(model)
    # With an adapter the module buffers are those of the base, which the reference shares.
    shared = named_persistent_buffers(model).keys() - names.keys()
    unknown = next((n for n in weights if n not in names and n not in shared), None)
    if unknown is not None:
        raise ValueError(f"The reference cannot take '{unknown}': the policy trains no tensor of that name.")
    copied = [(n, first[names[n]]) for n in weights if n in names]
    for n, reference in copied:
        if shards.get(first[n]) != shards.get(reference) or weights[n].shape != local_tensor(tensors[reference]).shape:
            raise ValueError(
                f"This rank holds other parts of '{reference}' than of '{n}', so that the reference cannot follow the "
                'policy: FSDP1 cuts adapters that way, so use FSDP2 (the environment variable FSDP_VERSION=2) or DDP.',
            )
    for n, reference in copied:
        local_tensor(tensors[reference]).copy_(weights[n])
