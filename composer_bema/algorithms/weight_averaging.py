# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What all averages share as Composer Algorithms: events, updates when due, swapping, checkpoints and resuming.

The average is in the model only where something looks at it: between ``EVAL_START`` and ``EVAL_END``, between
``PREDICT_START`` and ``PREDICT_END``, and while callbacks run at a checkpoint event. What an exception or a user left
there is out again before the next step, evaluation or save. No arithmetic lives here.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Optional, Union

import torch
from composer import Algorithm, Event, Logger, State, Time, TimeUnit

from composer_bema.algorithms import times
from composer_bema.algorithms.checkpointing import AveragingCheckpoint, check_entry_of_composers_ema
from composer_bema.algorithms.coexistence import check_algorithms, check_parallelism
from composer_bema.algorithms.savers import (
    Purpose,
    RestoreAfterFailedEvaluation,
    has_failed_evaluation,
    may_save,
    prepare_savers,
)
from composer_bema.averaging.parameters import copy_weights
from composer_bema.averaging.rules import Rule
from composer_bema.averaging.saving import MODEL_HOLDS
from composer_bema.averaging.state import AverageState, NonFinite

__all__ = ['SaveWeights', 'WeightAveraging', 'averages_among', 'swap_out_all']

log = logging.getLogger(__name__)

SaveWeights = Literal['average', 'training']

_STEP_EVENTS = (Event.BATCH_END, Event.EPOCH_END, Event.ITERATION_END)
_CHECKPOINT_EVENTS = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT)
_EVALUATION_STARTS = (Event.EVAL_START, Event.PREDICT_START)
_ENDS = (Event.BATCH_START, Event.EVAL_END, Event.PREDICT_END, Event.FIT_END)
# The methods for the events. Composer asks for each of these some twenty times a step.
_HANDLERS = {
    Event.INIT: '_start_run',
    Event.AFTER_LOAD: '_finish_loading',
    Event.FIT_START: '_start_fit',
    **dict.fromkeys(_STEP_EVENTS, '_end_step'),
    **dict.fromkeys(_EVALUATION_STARTS, '_start_evaluation'),
    **dict.fromkeys(_CHECKPOINT_EVENTS, '_start_checkpoint'),
    **dict.fromkeys(_ENDS, '_end'),
}


class WeightAveraging(Algorithm):
    """The base of all averages: an :class:`.AverageState` driven by Composer's events.

    Args:
        rule (Rule): The average.
        settings (dict): The settings of the rule, by the names of the constructor: numbers, strings and None.
        update_freq (Time): phi.
        half_life (str, optional): What the rule's elapsed time is counted in.
        snapshot_folder (str, optional): Where the rule's snapshots live on disk.

    The other arguments are documented at :class:`.BEMA`.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        settings: dict[str, Union[float, str, None]],
        update_freq: Time,
        update_after: Union[str, Time],
        half_life: Optional[Union[str, Time]] = None,
        snapshot_folder: Optional[str] = None,
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
        self.update_freq = update_freq
        self.update_after = times.parse_time('update_after', update_after, positive=False)
        self.half_life = None if half_life is None else times.parse_time('half_life', half_life, positive=True)
        self.eval_labels = None if eval_labels is None else tuple(eval_labels)
        self.save_weights = save_weights
        self.state_in_checkpoint = state_in_checkpoint
        # Plain values, for repr, for checkpoints, and to compare a checkpoint's with.
        self._settings = {
            'update_freq': self.update_freq.to_timestring(),
            'update_after': self.update_after.to_timestring(),
            'half_life': None if self.half_life is None else self.half_life.to_timestring(),
            **settings,
            'average_buffers': average_buffers,
        }
        self._new_average = functools.partial(
            AverageState,
            rule,
            average_buffers=average_buffers,
            nonfinite=nonfinite,
            device=device,
            snapshot_folder=snapshot_folder,
        )
        self._forget_run()

    def _forget_run(self) -> None:
        self.average = self._new_average()
        self.swapped_for: Optional[Purpose] = None
        self.was_in_loaded_model = False
        self._run: Optional[State] = None
        self._saves_average = False
        # The clocks of the run at the burn-in, from where update_freq counts, and at the last update.
        self._origin: dict[str, int] = {}
        self._last_update: dict[str, int] = {}
        # The label and the length of the training data.
        self._train_data: tuple[str, Union[int, Time]] = ('train', -1)

    def __repr__(self) -> str:
        arguments = ', '.join(f'{name}={value!r}' for name, value in self._settings.items() if value is not None)
        return f'{type(self).__name__}({arguments})'

    # What Composer calls

    def match(self, event: Event, state: State) -> bool:
        return event in _HANDLERS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        getattr(self, _HANDLERS[event])(event, state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Returns which weights the model holds; the average itself is in the entry of the `AveragingCheckpoint`."""
        return {**super().state_dict(), MODEL_HOLDS: 'average' if self.average.swapped else 'training'}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_entry_of_composers_ema(state)
        self.was_in_loaded_model = state.get(MODEL_HOLDS) == 'average'

    # What its companion in the checkpoint calls

    def saved_state(self) -> dict[str, Any]:
        """Returns all that a resumed run needs: tensors, numbers and strings."""
        return {
            'average': self.average.rule.average,
            'settings': self._settings,
            'origin': self._origin,
            'last_update': self._last_update,
            **self.average.state_dict(),
        }

    def restore(self, saved: dict[str, Any], state: State) -> None:
        """Goes on from what :meth:`saved_state` returned, and puts the training weights into the model."""
        self.average.load_state_dict(saved, state.model)
        self._warn_of_other_settings(saved)
        if saved['origin']:
            self._set_origin(saved['origin'])
        self._last_update = saved['last_update']

    # What users call

    def get_averaged_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts the average into a model, and returns it.

        In the model that is being trained the training weights are kept aside. They come back with
        :meth:`get_training_model` or before the next step or evaluation. Of another model the averaged tensors are
        overwritten, and the others, such as frozen parameters, are left as they are.

        Args:
            model (torch.nn.Module): The model that is being trained, or another one with its names.

        Raises:
            ValueError: If there was no update yet, or the model that is being trained holds the average already.
        """
        run = self._run_with_update()
        if not _is_part_of(model, run.model):
            self.average.copy_to(model)
            return model
        if self.average.swapped and not has_failed_evaluation(self, run.model):
            raise ValueError(f'The {self._name} weights are in the model already.')
        self._swap_in(run, 'user')
        return model

    def get_training_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts the training weights into a model, and returns it.

        Args:
            model (torch.nn.Module): The model that is being trained, or another one with its names.

        Raises:
            ValueError: If there is no run yet, or the training weights are in the model already.
        """
        if self._run is None:
            raise ValueError(f'{self._name} is in no run yet, so there are no training weights to give.')
        holder = next((average for average in averages_among(self._run.algorithms) if average.average.swapped), None)
        if not _is_part_of(model, self._run.model):
            copy_weights(self._run.model, model)
            if holder is not None:
                holder.average.copy_training_weights_to(model)
        elif holder is None:
            raise ValueError('The training weights are in the model already.')
        else:
            holder.swap_out()
        return model

    def averaged_state_dict(self) -> dict[str, Any]:
        """Returns the average as a plain state dict: canonical names, the model's dtypes, copies.

        Raises:
            ValueError: If there was no update yet.
        """
        return self.average.averaged_state_dict(self._run_with_update().model)

    # Events

    def _start_run(self, event: Event, state: State, logger: Logger) -> None:
        if self.swapped_for != 'user':
            # What a failed evaluation of the run before left in its model.
            self.swap_out()
        self._forget_run()
        self._run = state
        averages = averages_among(state.algorithms)
        self._saves_average = self.save_weights == 'average' or (self.save_weights is None and len(averages) == 1)
        state.model.register_state_dict_pre_hook(RestoreAfterFailedEvaluation(self))
        if self is averages[0]:
            check_algorithms(averages, state.algorithms)
            check_parallelism(averages, state)
            state.callbacks.append(AveragingCheckpoint(averages, state))
            prepare_savers(state.callbacks, averages)
        logger.log_hyperparameters({f'{self._prefix}/{name}': value for name, value in self._hyperparameters().items()})

    def _hyperparameters(self) -> dict[str, Any]:
        """Returns all settings, those that a checkpoint does not have among them."""
        return {
            **self._settings,
            'eval_labels': None if self.eval_labels is None else list(self.eval_labels),
            'save_weights': 'average' if self._saves_average else 'training',
            'state_in_checkpoint': self.state_in_checkpoint,
            'nonfinite': self.average.nonfinite,
            'device': None if self.average.device is None else str(self.average.device),
        }

    def _finish_loading(self, event: Event, state: State, logger: Logger) -> None:
        if state.dataloader is not None:
            self._remember_train_data(state)

    def _start_fit(self, event: Event, state: State, logger: Logger) -> None:
        swap_out_all(state)
        self._come_last(state)
        self._return_train_data(state)
        self._remember_train_data(state)
        self._check_against_run(state)
        if self.average.started:
            self._follow_reset_clocks(state)
        elif times.has_reached(self.update_after, state):
            if state.timestamp.batch > 0:
                warnings.warn(
                    f'{self._name} starts anew from the weights of step {state.timestamp.batch.value}: no average from '
                    'before that step was loaded.',
                    stacklevel=2,
                )
            self._start_average(state)

    def _end_step(self, event: Event, state: State, logger: Logger) -> None:
        """Takes theta_0 at the burn-in and updates when due, from the training weights whatever a save left behind."""
        swap_out_all(state)
        for name, time in self._times().items():
            times.check_unit(name, time, state)
        if not self.average.started:
            if times.has_reached(self.update_after, state):
                self._start_average(state)
        elif self._intervals_passed(state) > 0:
            self._update(state, logger)

    def _start_evaluation(self, event: Event, state: State, logger: Logger) -> None:
        """Puts the average in for an evaluator that sees it, and makes sure that no other one does."""
        sees_average = self.eval_labels is None or state.dataloader_label in self.eval_labels
        if not (sees_average and self.average.num_updates):
            self.swap_out()
            return
        swap_out_all(state)
        self.average.share_module_buffers()
        logger.log_metrics({f'{self._prefix}/distance': self.average.distance(state.model)})
        self._swap_in(state, 'evaluation')

    def _start_checkpoint(self, event: Event, state: State, logger: Logger) -> None:
        """Puts the average in if this is the one that is saved, and somebody saves."""
        averages = averages_among(state.algorithms)
        saved = next((average for average in averages if average._saves_average and average.average.num_updates), None)
        if self is not (saved or averages[0]):
            return
        savers = [type(callback).__name__ for callback in state.callbacks if may_save(callback, event, state)]
        if savers:
            if self is saved:
                self._swap_in(state, 'checkpoint')
            weights = f'the {self._name} weights' if self is saved else 'the training weights'
            log.info('Step %d: the model holds %s for %s.', state.timestamp.batch.value, weights, ', '.join(savers))

    def _end(self, event: Event, state: State, logger: Logger) -> None:
        self.swap_out()

    # The average

    def _start_average(self, state: State) -> None:
        self.average.start(state.model)
        self._last_update = times.clocks(state.timestamp)
        self._set_origin(self._last_update)

    def _set_origin(self, clocks: dict[str, int]) -> None:
        """Takes a moment for the burn-in: update_freq counts from there, and some rules do."""
        self._origin = clocks

    def _update(self, state: State, logger: Logger) -> None:
        elapsed = 1.0 if self.half_life is None else times.times_since(self._last_update, self.half_life, state)
        coefficients = self.average.update(state.model, state.timestamp.batch.value, elapsed)
        if coefficients is None:
            logger.log_metrics({f'{self._prefix}/num_skipped': self.average.num_skipped})
            return
        self._last_update = times.clocks(state.timestamp)
        metrics = {**coefficients, 'num_updates': self.average.num_updates}
        logger.log_metrics({f'{self._prefix}/{name}': value for name, value in metrics.items()})
        self._follow_update(state)

    def _follow_update(self, state: State) -> None:
        """Is called after each update, with the training weights in the model."""

    def _swap_in(self, state: State, purpose: Purpose) -> None:
        swap_out_all(state)
        # Known before, lest an interruption leave an average in the model that nobody knows the purpose of.
        self.swapped_for = purpose
        try:
            self.average.swap_in(state.model)
        except BaseException:
            self.swapped_for = None
            raise

    def swap_out(self) -> None:
        """Puts the training weights back into the model, if the average is there."""
        self.average.swap_out()
        self.swapped_for = None

    def _run_with_update(self) -> State:
        if self._run is None or not self.average.num_updates:
            raise ValueError(f'There was no {self._name} update yet, so there are no averaged weights to give.')
        return self._run

    # The run

    def _times(self) -> dict[str, Time]:
        given = {'update_freq': self.update_freq, 'update_after': self.update_after, 'half_life': self.half_life}
        return {name: time for name, time in given.items() if time is not None}

    def _intervals_passed(self, state: State) -> int:
        """Returns how many multiples of update_freq this event is the first one after."""
        return times.intervals_passed(self._origin, self.update_freq, state)

    def _follow_reset_clocks(self, state: State) -> None:
        """Counts from here on where the clocks stand before the last update, as after ``fit(reset_time=True)``."""
        now = times.clocks(state.timestamp)
        if now[TimeUnit.BATCH.value] < self._last_update[TimeUnit.BATCH.value]:
            self._last_update = now
            self._set_origin(now)

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
        first_update = times.steps_to_first_update(self.update_after, self.update_freq, state)
        length = times.steps_of_run(state)
        if first_update is not None and length is not None and first_update > length:
            warnings.warn(
                f'{self._name} will average nothing: its first update is due after {first_update:g} steps, but the run '
                f'ends after {length:g}.',
                stacklevel=2,
            )

    def _warn_of_other_settings(self, saved: dict[str, Any]) -> None:
        old = saved['settings']
        changed = [name for name, value in self._settings.items() if old.get(name) != value]
        if not changed:
            return
        changes = ', '.join(f'{name}={self._settings[name]!r} (saved: {old.get(name)!r})' for name in changed)
        has_begun = 'update_after' in changed and bool(saved['origin'])
        warnings.warn(
            f'{self._name} goes on with the saved buffers under other settings than the checkpoint: {changes}'
            + ('; averaging has begun, so that update_after has no effect.' if has_begun else '.'),
            stacklevel=2,
        )

    def _come_last(self, state: State) -> None:
        """Makes room for callbacks that were added later before the one that ends a checkpoint."""
        prepare_savers(state.callbacks, averages_among(state.algorithms))
        state.callbacks.sort(key=lambda callback: isinstance(callback, AveragingCheckpoint))

    def _remember_train_data(self, state: State) -> None:
        assert state.dataloader_label is not None, 'the trainer sets it with the dataloader'
        self._train_data = (state.dataloader_label, -1 if state.dataloader_len is None else state.dataloader_len)

    def _return_train_data(self, state: State) -> None:
        """Undoes what a failed evaluation leaves: Composer would train on the evaluator's data in the next fit."""
        if state.dataloader is not state.train_dataloader:
            state.set_dataloader(state.train_dataloader, *self._train_data)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _prefix(self) -> str:
        return self._name.lower()


def averages_among(algorithms: Sequence[Algorithm]) -> list[WeightAveraging]:
    """Returns those of the algorithms of a run that are averages."""
    return [algorithm for algorithm in algorithms if isinstance(algorithm, WeightAveraging)]


def swap_out_all(state: State) -> None:
    """Puts the training weights into the model of a run, whichever average is in it."""
    for average in averages_among(state.algorithms):
        average.swap_out()


def _is_part_of(part: torch.nn.Module, whole: torch.nn.Module) -> bool:
    """Returns whether a model is the other one, wrapped or not, or one of its submodules."""
    identities = {id(parameter) for parameter in whole.parameters()}
    return all(id(parameter) in identities for parameter in part.parameters())
