# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Who saves the model, and when: an average is in it while a saver runs, and out again whatever the saver does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional, Protocol

import torch
from composer import Callback, Event, Logger, State
from composer.callbacks import CheckpointSaver
from composer.loggers import LoggerDestination

__all__ = [
    'AfterSavers',
    'Purpose',
    'RestoreAfterFailedEvaluation',
    'Swappable',
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

    def swap_out(self) -> None:
        """Puts the training weights back, if the average is in the model."""
        ...


class AfterSavers(Callback):
    """Comes after the callbacks that save, and puts the training weights back."""

    def __init__(self, averages: Sequence[Swappable]) -> None:
        self._averages = averages

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        for average in self._averages:
            average.swap_out()

    epoch_checkpoint = iteration_checkpoint = batch_checkpoint

    def close(self, state: State, logger: Logger) -> None:
        for average in self._averages:
            if average.swapped_for != 'user':
                average.swap_out()


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
    if isinstance(callback, (LoggerDestination, AfterSavers)):
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
        if not isinstance(callback, (LoggerDestination, AfterSavers)):
            run_event = callback.run_event
            original = run_event.run_event if isinstance(run_event, _RestoreOnError) else run_event
            callback.run_event = _RestoreOnError(original, averages)
        for name in _SAVE_INTERVALS:
            interval = getattr(callback, name, None)
            if callable(interval):
                # Anew for each run, whose first step is not the last one's.
                setattr(callback, name, _AskedOnce(interval.interval if isinstance(interval, _AskedOnce) else interval))


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
        self.interval = interval
        self._asked: Optional[tuple[int, Event]] = None
        self._answer = False

    def __call__(self, state: State, event: Event) -> bool:
        if self._asked != (state.timestamp.batch.value, event):
            self._asked = (state.timestamp.batch.value, event)
            self._answer = bool(self.interval(state, event))
        return self._answer
