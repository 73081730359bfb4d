# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How an average goes into Composer's checkpoints and comes out of them: who saves, what is loaded, what is refused."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Optional, Protocol

import torch
from composer import Callback, Event, Logger, State
from composer.loggers import LoggerDestination

from composer_bema.averaging.state import BUFFERS, MODEL_HOLDS

__all__ = ['RestoreAfterCheckpoint', 'RestoreAfterFailedEvaluation', 'is_resumable', 'may_save']

# Under these names Composer's CheckpointSaver and llm-foundry's HuggingFaceCheckpointer keep the callable that says
# whether they are about to save.
_SAVE_INTERVALS = ('save_interval', 'check_interval')


class Swappable(Protocol):
    """What the hooks need of an average."""

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation has the average in the model."""
        ...

    def swap_out(self) -> None:
        """Puts the training weights back."""
        ...


class RestoreAfterCheckpoint(Callback):
    """Comes after the callbacks that save, and puts the training weights back."""

    def __init__(self, algorithm: Swappable) -> None:
        self._algorithm = algorithm

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._algorithm.swap_out()

    epoch_checkpoint = iteration_checkpoint = batch_checkpoint


class RestoreAfterFailedEvaluation:
    """A hook of ``state_dict``: an evaluation that raised has no end, but what is saved next are training weights.

    A copy of the model, and a pickled one, carry a hook that does nothing.
    """

    def __init__(self, algorithm: Optional[Swappable] = None) -> None:
        self._algorithm = None if algorithm is None else weakref.ref(algorithm)

    def __call__(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        algorithm = None if self._algorithm is None else self._algorithm()
        # Composer evaluates in eval mode, and leaves it on an exception too.
        if algorithm is not None and algorithm.is_evaluating and module.training:
            algorithm.swap_out()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def may_save(callback: Callback, event: Event, state: State) -> bool:
    """Returns whether a callback does something at a checkpoint event; one with an interval is asked for it."""
    if isinstance(callback, (LoggerDestination, RestoreAfterCheckpoint)):
        return False
    hooks = ('run_event', event.value)
    if all(getattr(type(callback), hook) is getattr(Callback, hook) for hook in hooks):
        return False
    for name in _SAVE_INTERVALS:
        interval = getattr(callback, name, None)
        if callable(interval):
            saved_already = getattr(callback, 'last_checkpoint_batch', None) == state.timestamp.batch
            return not saved_already and bool(interval(state, event))
    return True


def is_resumable(name: str, saved: dict[str, Any]) -> bool:
    """Returns whether a checkpoint's entry has buffers to go on from.

    Args:
        name (str): The average's class name, for the messages.
        saved (dict[str, Any]): The entry that Composer found under that name.

    Raises:
        ValueError: If the entry cannot be taken and the model beside it is an average, which nobody may train on from
            unawares.
    """
    if 'ema_model' in saved:
        return _refuse_composer_entry(saved)
    average = saved['average']
    if BUFFERS in average:
        return True
    if average[MODEL_HOLDS] == 'average':
        raise ValueError(
            f'The checkpoint was saved with state_in_checkpoint=False and holds the {name} weights only, so its '
            'training cannot be resumed. To start a new run from the average, load it with load_weights_only=True.',
        )
    return False


def _refuse_composer_entry(saved: dict[str, Any]) -> bool:
    if saved.get('ema_weights_active'):
        raise ValueError(
            "The checkpoint's 'EMA' entry was written by Composer's own EMA, and its model holds the averaged weights: "
            'resume it with composer.algorithms.EMA, or start a new run from the average with load_weights_only=True.',
        )
    warnings.warn("The checkpoint's 'EMA' entry was written by Composer's own EMA and is not loaded.", stacklevel=2)
    return False
