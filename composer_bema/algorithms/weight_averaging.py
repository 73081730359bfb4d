# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What all averages share as Composer Algorithms: events, updates when due, swapping, checkpoints and resuming.

The average is in the model only where something looks at it: between ``EVAL_START`` and ``EVAL_END``, between
``PREDICT_START`` and ``PREDICT_END``, and while callbacks run at a checkpoint event. Every other event finds the
training weights. No arithmetic lives here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

import torch
from composer import Algorithm, Event, Logger, State, Time, TimeUnit
from composer.algorithms import EMA as ComposerEMA

from composer_bema.algorithms import times
from composer_bema.algorithms.checkpointing import (
    RestoreAfterCheckpoint,
    RestoreAfterFailedEvaluation,
    is_resumable,
    may_save,
)
from composer_bema.averaging.rules import Rule
from composer_bema.averaging.state import MODEL_HOLDS, AverageState, NonFinite

__all__ = ['SaveWeights', 'WeightAveraging', 'check_algorithms']

log = logging.getLogger(__name__)

SaveWeights = Literal['average', 'training']

_STEP_EVENTS = (Event.BATCH_END, Event.EPOCH_END, Event.ITERATION_END)
_CHECKPOINT_EVENTS = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT)
_EVALUATION_STARTS = (Event.EVAL_START, Event.PREDICT_START)
_RESTORING_EVENTS = (Event.BATCH_START, Event.EVAL_END, Event.PREDICT_END, Event.FIT_END)


class WeightAveraging(Algorithm):
    """The base of all averages: an :class:`.AverageState` driven by Composer's events.

    Args:
        rule (Rule): The average.
        settings (dict[str, float | None]): The settings of the rule, by the names of the constructor.
        update_freq (str): phi, as a Composer time string.
        update_after (str): tau, as a Composer time string.
        half_life (Time, optional): The half-life that the rule counts in, whose unit its elapsed time comes in.

    The other arguments are documented at :class:`.BEMA`.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        settings: dict[str, Optional[float]],
        update_freq: Union[str, Time],
        update_after: Union[str, Time],
        half_life: Optional[Time],
        eval_labels: Optional[Sequence[str]],
        save_weights: Optional[SaveWeights],
        state_in_checkpoint: bool,
        average_buffers: bool,
        nonfinite: NonFinite,
        device: Optional[Union[torch.device, str]],
    ) -> None:
        if save_weights not in (None, 'average', 'training'):
            raise ValueError(f"save_weights must be 'average', 'training' or None, but is {save_weights!r}.")
        if isinstance(eval_labels, str):
            raise TypeError(f'eval_labels must be a list of evaluator labels, such as [{eval_labels!r}].')
        self.update_freq = times.parse_time('update_freq', update_freq, positive=True)
        self.update_after = times.parse_time('update_after', update_after, positive=False)
        self.half_life = half_life
        self.eval_labels = None if eval_labels is None else tuple(eval_labels)
        self.save_weights = save_weights
        self.state_in_checkpoint = state_in_checkpoint
        # Plain values, for repr, for checkpoints, and to compare a checkpoint's with.
        self._settings = {
            'update_freq': self.update_freq.to_timestring(),
            'update_after': self.update_after.to_timestring(),
            'half_life': None if half_life is None else half_life.to_timestring(),
            **settings,
            'average_buffers': average_buffers,
        }
        self._new_average = lambda: AverageState(
            rule, average_buffers=average_buffers, nonfinite=nonfinite, device=device
        )
        self._reset()

    def __repr__(self) -> str:
        arguments = ', '.join(f'{name}={value!r}' for name, value in self._settings.items() if value is not None)
        return f'{type(self).__name__}({arguments})'

    # What Composer calls

    def match(self, event: Event, state: State) -> bool:
        return self._action(event, state) is not None

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        action = self._action(event, state)
        assert action is not None, 'the engine applies what matches'
        action(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers, strings, dicts and lists only, so that a restricted unpickler takes them."""
        average = self.average.state_dict()
        if not self.state_in_checkpoint:
            average = {MODEL_HOLDS: average[MODEL_HOLDS]}
        return {
            **super().state_dict(),
            'settings': self._settings,
            'origin': self._origin.to_dict(),
            'last_update': self._last_update.to_dict(),
            'average': average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state until the model's weights are loaded and stand on their devices."""
        self._loaded = state if is_resumable(self._name, state) else None

    # What users call

    def get_averaged_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts the average into a model, and returns it.

        In the model that is being trained the training weights are kept aside, and come back with
        :meth:`get_training_model` or with the next training step.

        Args:
            model (torch.nn.Module): The model that is being trained, or another one of the same architecture.

        Raises:
            ValueError: If there was no update yet, or the model that is being trained holds the average already.
        """
        run = self._run_with_update()
        if not _share_parameters(model, run.model):
            self.average.copy_to(model)
            return model
        if self.average.swapped:
            raise ValueError(f'The {self._name} weights are in the model already.')
        self._swap_in(run)
        return model

    def get_training_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts the training weights into a model, and returns it.

        Args:
            model (torch.nn.Module): The model that is being trained, or another one of the same architecture.

        Raises:
            ValueError: If the training weights are in the model that is being trained already.
        """
        if self._run is None or not self.average.swapped:
            raise ValueError('The training weights are in the model that is being trained already.')
        if _share_parameters(model, self._run.model):
            self.swap_out()
        else:
            self.average.copy_training_weights_to(model)
        return model

    def averaged_state_dict(self) -> dict[str, Any]:
        """Returns the average as a plain state dict: canonical names, the model's dtypes, copies.

        Raises:
            ValueError: If there was no update yet.
        """
        return self.average.averaged_state_dict(self._run_with_update().model)

    # Events

    def _action(self, event: Event, state: State) -> Optional[Callable[[State, Logger], None]]:
        """Returns what there is to do at an event, or None."""
        if event in _STEP_EVENTS:
            return self._step_action(state)
        if event in _EVALUATION_STARTS:
            return self._start_evaluation
        if event in _RESTORING_EVENTS:
            return self._restore_training_weights if self.average.swapped else None
        if event in _CHECKPOINT_EVENTS:
            return self._start_checkpoint if self._is_saved(event, state) else None
        return {
            Event.INIT: self._start_run,
            Event.AFTER_LOAD: self._take_loaded_state,
            Event.FIT_START: self._start_fit,
        }.get(event)

    def _start_run(self, state: State, logger: Logger) -> None:
        self._reset()
        self._run = state
        averages = _averages(state)
        check_algorithms(self, state.algorithms)
        self._saves_average = self.save_weights == 'average' or (self.save_weights is None and len(averages) == 1)
        state.model.register_state_dict_pre_hook(RestoreAfterFailedEvaluation(self))
        if self._saves_average:
            state.callbacks.append(RestoreAfterCheckpoint(self))

    def _start_fit(self, state: State, logger: Logger) -> None:
        _restore_training_weights(state)
        self._return_train_dataloader(state)
        self._take_loaded_state(state, logger)
        self._check_against_run(state)
        if self.average.started:
            self._align_marks(state)
        elif times.is_reached(self.update_after, state):
            if state.timestamp.batch > 0:
                warnings.warn(
                    f'{self._name} starts anew from the weights of step {state.timestamp.batch.value}: the checkpoint '
                    f'holds no {self._name} state.',
                    stacklevel=2,
                )
            self._take_snapshot(state, logger)

    def _step_action(self, state: State) -> Optional[Callable[[State, Logger], None]]:
        for name, time in self._times().items():
            times.check_unit(name, time, state)
        if not self.average.started:
            return self._take_snapshot if times.is_reached(self.update_after, state) else None
        return self._update if self._is_due(state) else None

    def _take_snapshot(self, state: State, logger: Logger) -> None:
        _restore_training_weights(state)
        self.average.start(state.model)
        self._mark_origin(state)
        self._mark_update(state)

    def _update(self, state: State, logger: Logger) -> None:
        _restore_training_weights(state)
        elapsed = times.elapsed(self._last_update.unit, state) - self._last_update.value
        coefficients = self.average.update(state.model, state.timestamp.batch.value, elapsed)
        if coefficients is None:
            logger.log_metrics({f'{self._prefix}/num_skipped': self.average.num_skipped})
            return
        self._mark_update(state)
        metrics = {**coefficients, 'num_updates': self.average.num_updates}
        logger.log_metrics({f'{self._prefix}/{name}': value for name, value in metrics.items()})

    def _start_evaluation(self, state: State, logger: Logger) -> None:
        """Puts the average in for an evaluator that sees it, and makes sure that no other one does."""
        self._take_loaded_state(state, logger)
        sees_average = self.eval_labels is None or state.dataloader_label in self.eval_labels
        if not (sees_average and self.average.num_updates):
            self.swap_out()
            return
        _restore_training_weights(state)
        logger.log_metrics({f'{self._prefix}/distance': self.average.distance(state.model)})
        self._swap_in(state)
        self.is_evaluating = True

    def _start_checkpoint(self, state: State, logger: Logger) -> None:
        self._swap_in(state)
        log.info(
            'The %s weights (step %d, %d updates) are in the model for this checkpoint.',
            self._name,
            state.timestamp.batch.value,
            self.average.num_updates,
        )

    def _restore_training_weights(self, state: State, logger: Logger) -> None:
        self.swap_out()

    # The model

    def _swap_in(self, state: State) -> None:
        _restore_training_weights(state)
        self.average.swap_in(state.model)

    def swap_out(self) -> None:
        """Puts the training weights back into the model, if the average is there."""
        self.average.swap_out()
        self.is_evaluating = False

    def _is_saved(self, event: Event, state: State) -> bool:
        """Returns whether a callback may save the model at this event, and should find the average in it."""
        if not (self._saves_average and self.average.num_updates):
            return False
        return any(may_save(callback, event, state) for callback in state.callbacks)

    def _run_with_update(self) -> State:
        if self._run is None or not self.average.num_updates:
            raise ValueError(f'There was no {self._name} update yet, so there are no averaged weights to give.')
        return self._run

    # Times

    def _times(self) -> dict[str, Time]:
        given = {'update_freq': self.update_freq, 'update_after': self.update_after, 'half_life': self.half_life}
        return {name: time for name, time in given.items() if time is not None}

    def _is_due(self, state: State) -> bool:
        assert state.previous_timestamp is not None, 'the trainer sets it with the first step'
        now, before = (
            times.intervals_since(self._origin.value, self.update_freq, timestamp, state)
            for timestamp in (state.timestamp, state.previous_timestamp)
        )
        return now > before

    def _mark_origin(self, state: State) -> None:
        unit = times.counted_unit(self.update_freq, state)
        self._origin = _Mark(times.position(self.update_freq, state.timestamp, state), unit)

    def _mark_update(self, state: State) -> None:
        unit = TimeUnit.BATCH if self.half_life is None else self.half_life.unit
        self._last_update = _Mark(times.elapsed(unit, state), unit)

    def _align_marks(self, state: State) -> None:
        """Counts from here on where a resumed run counts in other units than the saved one."""
        if self._origin.unit != times.counted_unit(self.update_freq, state):
            self._mark_origin(state)
        if self.half_life is not None and self._last_update.unit != self.half_life.unit:
            self._mark_update(state)

    def _check_against_run(self, state: State) -> None:
        for name, time in self._times().items():
            times.check_unit(name, time, state)
        if self.half_life is not None and self.half_life.unit == TimeUnit.EPOCH and state.dataloader_len is None:
            raise ValueError('half_life counts epochs, but the length of an epoch is not known: use another unit.')
        labels = [evaluator.label for evaluator in state.evaluators]
        for label in self.eval_labels or ():
            if label not in (*labels, 'predict'):
                raise ValueError(
                    f"{self._name} has the eval label '{label}', but the evaluators of this run are {sorted(labels)}.",
                )
        if not self.average.started:
            self._warn_of_a_short_run(state)

    def _warn_of_a_short_run(self, state: State) -> None:
        wait, interval, length = (
            times.in_batches(time, state) for time in (self.update_after, self.update_freq, state.max_duration)
        )
        if wait is not None and interval is not None and length is not None and wait + interval > length:
            warnings.warn(
                f'{self._name} will average nothing: its first update is due after {wait + interval:g} steps, but the '
                f'run ends after {length:g}.',
                stacklevel=2,
            )

    # Resuming

    def _take_loaded_state(self, state: State, logger: Logger) -> None:
        if self._loaded is None:
            return
        saved, self._loaded = self._loaded, None
        self._warn_of_other_settings(saved['settings'])
        self.average.load_state_dict(saved['average'], state.model)
        self._origin, self._last_update = _Mark.from_dict(saved['origin']), _Mark.from_dict(saved['last_update'])

    def _warn_of_other_settings(self, saved: dict[str, Any]) -> None:
        changed = {name: (saved.get(name), value) for name, value in self._settings.items() if saved.get(name) != value}
        if changed:
            changes = ', '.join(f'{name}={new!r} (saved: {old!r})' for name, (old, new) in changed.items())
            warnings.warn(
                f'{self._name} goes on with the saved buffers under other settings than the checkpoint: {changes}.',
                stacklevel=2,
            )

    def _return_train_dataloader(self, state: State) -> None:
        """Undoes what a failed evaluation leaves: Composer would train on the evaluator's data in the next fit."""
        if state.dataloader is not state.train_dataloader:
            label, length = self._train_data or ('train', -1)
            state.set_dataloader(state.train_dataloader, label, length)
        assert state.dataloader_label is not None, 'the trainer sets it with the dataloader'
        self._train_data = (state.dataloader_label, -1 if state.dataloader_len is None else state.dataloader_len)

    def _reset(self) -> None:
        """Forgets the run, so that one object can serve in one Trainer after another."""
        self.average = self._new_average()
        self._run: Optional[State] = None
        self._saves_average = False
        self._loaded: Optional[dict[str, Any]] = None
        # Where update_freq counts from, and when the last update was, in the unit of half_life.
        self._origin = _Mark(0, TimeUnit.BATCH)
        self._last_update = _Mark(0, TimeUnit.BATCH)
        # Whether it is an evaluation, rather than a checkpoint or the user, that has the average in the model.
        self.is_evaluating = False
        self._train_data: Optional[tuple[str, Union[int, Time]]] = None

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _prefix(self) -> str:
        return self._name.lower()


@dataclass(frozen=True)
class _Mark:
    """A moment of the run, in one unit."""

    value: float
    unit: TimeUnit

    def to_dict(self) -> dict[str, Any]:
        return {'value': self.value, 'unit': self.unit.value}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> _Mark:
        return cls(saved['value'], TimeUnit(saved['unit']))


def _averages(state: State) -> list[WeightAveraging]:
    return [algorithm for algorithm in state.algorithms if isinstance(algorithm, WeightAveraging)]


def _restore_training_weights(state: State) -> None:
    """Puts the training weights into the model, whichever average is in it."""
    for average in _averages(state):
        average.swap_out()


def _share_parameters(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    identities = {id(parameter) for parameter in other.parameters()}
    return any(id(parameter) in identities for parameter in one.parameters())


def check_algorithms(average: WeightAveraging, algorithms: Sequence[Algorithm]) -> None:
    """Checks an average against the other algorithms of a run.

    Raises:
        ValueError: If two of them have one class name, evaluator or the checkpoints in common.
    """
    name = type(average).__name__
    for other in algorithms:
        if other is average:
            continue
        if isinstance(other, ComposerEMA):
            raise ValueError(
                f"Composer's own EMA and {name} cannot share a run, since both put an average into the model: use "
                'composer_bema.EMA, whose eval_labels keep them apart.',
            )
        if type(other).__qualname__ == type(average).__qualname__:
            raise ValueError(
                f'A run can have one {name} only, since Composer restores algorithms by their class name: compute '
                'further averages from checkpoints afterwards.',
            )
        if isinstance(other, WeightAveraging):
            _check_pair(average, other)


def _check_pair(one: WeightAveraging, other: WeightAveraging) -> None:
    names = f'{type(one).__name__} and {type(other).__name__}'
    if one.save_weights == other.save_weights == 'average':
        raise ValueError(f"{names} both have save_weights='average', but a checkpoint's model can hold one average.")
    if one.eval_labels is None or other.eval_labels is None:
        raise ValueError(
            f"{names} share a run: give each of them eval_labels of its own, such as eval_labels=['bema'], and the "
            'Trainer an Evaluator of that label.',
        )
    shared = set(one.eval_labels) & set(other.eval_labels)
    if shared:
        raise ValueError(f"{names} share the eval label '{min(shared)}', but an evaluator can see one average only.")
