# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""An average in a model for a while: how it gets there, and how the training weights come back bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from composer_bema.averaging import kernels
from composer_bema.averaging.parameters import matching_tensors, named_tensors
from composer_bema.averaging.signals import uninterrupted

__all__ = ['Swap', 'holds_an_average']

# Modules that hold an average, and the swap that has put it there.
_holders: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Swap]] = weakref.WeakKeyDictionary()


def holds_an_average(model: torch.nn.Module) -> bool:
    """Returns whether a swap has put an average into a model, or into a part of it, and has not taken it out again."""
    return bool(_holders) and any(_holders[m]() is not None for m in model.modules() if m in _holders)


class Swap:
    """One trade of a model's weights for an average.

    Values are exchanged bit for bit where dtype and device agree. Elsewhere the training weights rest in a copy of
    their own dtype, since a trip of the average through bf16 weights would round it. What is done is noted launch by
    launch, so that a trade of which a later one fails can be undone.

    Args:
        model (torch.nn.Module): The model, holding its training weights.
        average (Mapping[str, torch.Tensor]): The average by canonical name. Where values are exchanged, its memory
            holds the training weights meanwhile.
    """

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module, average: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._average = average
        # The names in their order; the values say nothing.
        self._exchanged: dict[str, None] = {}
        # All that can fail for want of memory comes before the first weight is touched.
        self._stash = {
            n: tensor.clone() for n, tensor in self._live(average).items() if not _exchangeable(tensor, average[n])
        }

    @torch.no_grad()
    def put_in(self) -> None:
        """Puts the average into the model."""
        live = self._live(self._average)
        _holders.update({module: weakref.ref(self) for module in self._model.modules()})
        for n in self._stash:
            live[n].copy_(self._average[n])
        exchanged = [n for n in live if n not in self._stash]
        for names in _launches(exchanged, live, self._average):
            with uninterrupted():
                _exchange(names, live, self._average)
                self._exchanged.update(dict.fromkeys(names))

    @torch.no_grad()
    def take_out(self) -> None:
        """Puts the training weights back, wherever the model keeps its tensors by now."""
        resting = self.training_weights()
        live = self._live(resting)
        for n, stashed in list(self._stash.items()):
            live[n].copy_(stashed)
            del self._stash[n]
        # In reverse, in case that two names share memory without being tied.
        for names in _launches(list(reversed(self._exchanged)), live, resting):
            with uninterrupted():
                _exchange(names, live, resting)
                for n in names:
                    del self._exchanged[n]
        for module in self._model.modules():
            _holders.pop(module, None)

    @property
    def in_model(self) -> frozenset[str]:
        """The names of which the model holds the average exactly."""
        return frozenset(self._exchanged)

    def training_weights(self) -> dict[str, torch.Tensor]:
        """Returns the training weights, where they rest."""
        return {**self._stash, **{n: self._average[n] for n in self._exchanged}}

    def average(self) -> dict[str, torch.Tensor]:
        """Returns the average: the model's memory where values were exchanged."""
        return {**self._average, **self._live({n: self._average[n] for n in self._exchanged})}

    def _live(self, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Looked up each time: the model may have been moved, cast or loaded into meanwhile.
        return matching_tensors(wanted, named_tensors(self._model))


def _exchangeable(live: torch.Tensor, kept: torch.Tensor) -> bool:
    return live.dtype == kept.dtype and live.device == kept.device


def _launches(
    names: Sequence[str], live: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> list[list[str]]:
    """Returns names in groups, each of which is exchanged as a whole."""
    alike = [n for n in names if _exchangeable(live[n], kept[n])]
    groups = kernels.exchange_groups([live[n] for n in alike], [kept[n] for n in alike])
    # The model was cast or moved while it held the average.
    others = [n for n in names if not _exchangeable(live[n], kept[n])]
    return [*([alike[i] for i in group] for group in groups), *([n] for n in others)]


def _exchange(names: Sequence[str], live: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> None:
    if all(_exchangeable(live[n], kept[n]) for n in names):
        kernels.exchange([live[n] for n in names], [kept[n] for n in names])
        return
    for n in names:
        average = live[n].to(kept[n], copy=True)
        live[n].copy_(kept[n])
        kept[n].copy_(average)
