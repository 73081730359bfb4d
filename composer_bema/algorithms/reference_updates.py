# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""When the reference model of a run becomes the average of its policy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, Union

import torch
from composer import State, Time
from torch.nn.parallel import DistributedDataParallel

from composer_bema.algorithms import times

__all__ = ['ReferenceUpdates']


class HasReference(Protocol):
    """What this module needs of a model."""

    def update_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Overwrites the reference with values for the policy's tensors, by their canonical names in the model."""
        ...


class ReferenceUpdates:
    """A count of the run's time, and the updates of the reference that are due by it.

    The first is due when ``update_after`` is reached, and the others every ``update_freq`` after that.

    Args:
        update_freq (str | Time): The time from one update to the next.
        update_after (str | Time): The time of the first one.
    """

    def __init__(self, update_freq: Union[str, Time], update_after: Union[str, Time]) -> None:
        self.update_freq = times.parse_time('ref_model_update_freq', update_freq, positive=True)
        self.update_after = times.parse_time('ref_model_update_after', update_after, positive=False)
        self.forget_run()

    def forget_run(self) -> None:
        """Starts over, for another run."""
        self.num_updates = 0
        self._origin: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: numbers."""
        return {'num_updates': self.num_updates, 'origin': self._origin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self.num_updates, self._origin = state['num_updates'], state['origin']

    def start(self, state: State) -> None:
        """Checks that the run has a reference, and counts from here if the time of the first update has come.

        Raises:
            ValueError: If the model has no reference.
        """
        _reference_owner(state)
        if not self._origin and times.has_reached(self.update_after, state):
            self.count_from_here(state)
        if self._origin and not self.num_updates:
            self._warn_of_a_short_run(state)

    def _warn_of_a_short_run(self, state: State) -> None:
        first = times.steps_to_first_update(self.update_after, self.update_freq, state)
        length = times.steps_of_run(state)
        if first is not None and length is not None and first > length:
            warnings.warn(
                f'The reference model will not follow: its first update is due after {first:g} steps, but the run ends '
                f'after {length:g}.',
                stacklevel=2,
            )

    def count_from_here(self, state: State) -> None:
        """Lets the next update come after another ``update_freq``."""
        self._origin = times.clocks(state.timestamp)

    def follow_reset_clocks(self, state: State) -> None:
        """Counts from here on where the clocks were set back, as after ``fit(reset_time=True)``."""
        if self._origin:
            self.count_from_here(state)

    def advance(self, state: State) -> bool:
        """Counts the step that has ended, or the epoch; returns whether the reference is to be updated after it."""
        if self._origin:
            return times.intervals_passed(self._origin, self.update_freq, state) > 0
        if not times.has_reached(self.update_after, state):
            return False
        self.count_from_here(state)
        return True

    def apply(self, average: Mapping[str, torch.Tensor], state: State) -> None:
        """Makes the reference the average."""
        _reference_owner(state).update_reference(average)
        self.num_updates += 1


def _reference_owner(state: State) -> HasReference:
    model: Any = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    if not hasattr(model, 'update_reference'):
        raise ValueError(
            f'update_ref_model needs a model with a reference, such as DPO, but the model of this run is a '
            f'{type(model).__name__}, which has no update_reference.',
        )
    return model
