# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How an average goes into Composer's checkpoints and comes out of them: who saves, what is loaded, what is refused."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional, Protocol

import torch
from composer import Callback, Event, Logger, State
from composer.callbacks import CheckpointSaver
from composer.loggers import LoggerDestination

from composer_bema.averaging.state import BUFFERS, MODEL_HOLDS

__all__ = [
    'AveragingCheckpoint',
    'Purpose',
    'RestoreAfterFailedEvaluation',
    'has_buffers',
    'has_failed_evaluation',
    'may_save',
    'prepare_savers',
]

Purpose = Literal['evaluation', 'checkpoint', 'user']

# Under these names Composer's CheckpointSaver and llm-foundry's HuggingFaceCheckpointer keep the callable that says
# whether they are about to save.
_SAVE_INTERVALS = ('save_interval', 'check_interval')


class Swappable(Protocol):
    """What this module needs of an average."""

    swapped_for: Optional[Purpose]
    is_restored: bool

    def swap_out(self) -> None:
        """Puts the training weights back, if the average is in the model."""
        ...


class AveragingCheckpoint(Callback):
    """Comes after the callbacks that save and puts the training weights back; remembers what the model held.

    It is in every run that has an average, whichever that is, so that none trains on from another's average unawares.
    """

    def __init__(self, averages: Sequence[Swappable]) -> None:
        self._averages = averages
        self._loaded: Optional[dict[str, Any]] = None

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        for average in self._averages:
            average.swap_out()

    epoch_checkpoint = iteration_checkpoint = batch_checkpoint

    def close(self, state: State, logger: Logger) -> None:
        for average in self._averages:
            if average.swapped_for != 'user':
                average.swap_out()

    def state_dict(self) -> dict[str, Any]:
        holders = [type(average).__name__ for average in self._averages if average.swapped_for]
        return {MODEL_HOLDS: holders[0] if holders else 'training'}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def after_load(self, state: State, logger: Logger) -> None:
        holder = 'training' if self._loaded is None else self._loaded[MODEL_HOLDS]
        self._loaded = None
        restored = [type(average).__name__ for average in self._averages if average.is_restored]
        if holder not in ('training', *restored):
            raise ValueError(
                f'The model in the checkpoint holds the {holder} weights, and no training weights were loaded with '
                f'it: resume with {holder} among the algorithms and its state in the checkpoint, or start a new run '
                'from the average with load_weights_only=True.',
            )


class RestoreAfterFailedEvaluation:
    """A hook of ``state_dict``: an evaluation that raised has no end, but what is saved next are training weights.

    A copy of the model, and a pickled one, carry a hook that does nothing.
    """

    def __init__(self, average: Optional[Swappable] = None) -> None:
        self._average = None if average is None else weakref.ref(average)

    def __call__(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        average = None if self._average is None else self._average()
        if average is not None and has_failed_evaluation(average, module):
            average.swap_out()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def has_failed_evaluation(average: Swappable, model: torch.nn.Module) -> bool:
    """Returns whether the average is in the model for an evaluation that is over without having ended."""
    # Composer evaluates in eval mode, and returns to training mode on an exception too.
    return average.swapped_for == 'evaluation' and model.training


def may_save(callback: Callback, event: Event, state: State) -> bool:
    """Returns whether a callback may save the model at a checkpoint event.

    A saver with an interval is asked. Of the others nothing is known but their hooks: what has none for the event does
    not save, nor do loggers, which come last, and Composer's own callbacks that listen to everything.
    """
    if isinstance(callback, (LoggerDestination, AveragingCheckpoint)):
        return False
    listens_to_all = type(callback).run_event is not Callback.run_event
    hook = getattr(type(callback), event.value)
    if not listens_to_all and hook is getattr(Callback, event.value):
        return False
    if listens_to_all or hook is getattr(CheckpointSaver, event.value):
        intervals = [getattr(callback, name) for name in _SAVE_INTERVALS if callable(getattr(callback, name, None))]
        if intervals:
            has_saved = getattr(callback, 'last_checkpoint_batch', None) == state.timestamp.batch
            return not has_saved and bool(intervals[0](state, event))
        if type(callback).__module__.startswith('composer.'):
            return False
    return True


def prepare_savers(callbacks: Sequence[Callback], averages: Sequence[Swappable]) -> None:
    """Makes savers fit to be asked and to fail.

    Each asks its interval once an event, whoever else wants to know, since it may be a function with a memory. One that
    raises (a full disk) leaves training weights behind: no later event would come to put them back.
    """
    for callback in callbacks:
        if not isinstance(callback, (LoggerDestination, AveragingCheckpoint)):
            run_event = callback.run_event
            original = run_event.run_event if isinstance(run_event, _RestoreOnError) else run_event
            callback.run_event = _RestoreOnError(original, averages)
        for name in _SAVE_INTERVALS:
            interval = getattr(callback, name, None)
            if callable(interval) and not isinstance(interval, _AskedOnce):
                setattr(callback, name, _AskedOnce(interval))


class _RestoreOnError:
    """A callback's ``run_event`` that puts the training weights back if it raises at a checkpoint."""

    def __init__(self, run_event: Callable[..., Any], averages: Sequence[Swappable]) -> None:
        self.run_event = run_event
        self._averages = averages

    def __call__(self, event: Event, state: State, logger: Logger) -> None:
        try:
            self.run_event(event, state, logger)
        except BaseException:
            for average in self._averages:
                if average.swapped_for == 'checkpoint':
                    average.swap_out()
            raise


class _AskedOnce:
    """An interval that gives the same answer to all who ask at one event of one step."""

    def __init__(self, interval: Callable[..., Any]) -> None:
        self._interval = interval
        self._asked: Optional[tuple[int, Event]] = None
        self._answer = False

    def __call__(self, state: State, event: Event) -> bool:
        if self._asked != (state.timestamp.batch.value, event):
            self._asked = (state.timestamp.batch.value, event)
            self._answer = bool(self._interval(state, event))
        return self._answer


def has_buffers(saved: dict[str, Any]) -> bool:
    """Returns whether the entry that a checkpoint has under an average's name is ours and holds its buffers.

    Raises:
        ValueError: If it is of Composer's own EMA and the model beside it is that average, which nobody may train on
            from unawares.
    """
    if 'ema_model' not in saved:
        return BUFFERS in saved['average']
    if saved.get('ema_weights_active'):
        raise ValueError(
            "The checkpoint's 'EMA' entry was written by Composer's own EMA, and its model holds the averaged weights: "
            'resume it with composer.algorithms.EMA, or start a new run from the average with load_weights_only=True.',
        )
    warnings.warn("The checkpoint's 'EMA' entry was written by Composer's own EMA and is not loaded.", stacklevel=2)
    return False
