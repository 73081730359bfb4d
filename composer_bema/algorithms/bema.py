# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""BEMA and EMA of the weights as Composer Algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from composer import Event, Logger, State, Time

from composer_bema.algorithms.reference_updates import ReferenceUpdates
from composer_bema.algorithms.times import in_half_lives, parse_update_freq
from composer_bema.algorithms.weight_averaging import SaveWeights, WeightAveraging
from composer_bema.averaging.defaults import DEFAULTS, default_update_freq
from composer_bema.averaging.rules import bema_rule, ema_rule
from composer_bema.averaging.state import NonFinite

__all__ = ['BEMA', 'EMA']

# Where a checkpoint has when the reference model was updated.
_REFERENCE = 'reference'


class BEMA(WeightAveraging):
    r"""Evaluates and checkpoints a run with an average of its weights whose lag is corrected (arXiv 2508.00180).

    .. math::
        EMA_t &= (1 - \beta_t) EMA_{t - \phi} + \beta_t \theta_t, & \beta_t &= \max((\rho + \gamma t)^{-\kappa}, m) \\
        BEMA_t &= EMA_t + \alpha_t (\theta_t - \theta_0), & \alpha_t &= (\rho + \gamma t)^{-\eta}

    where t counts optimizer steps since the start of the run, :math:`\theta_t` are the weights after t steps,
    :math:`\theta_0` those at the burn-in :math:`\tau`, and neither alpha nor beta exceeds 1. The names and defaults are
    those of TRL's ``BEMACallback``.

    Runs on ``FIT_START`` and after steps, epochs and iterations (updates), around evaluation and prediction (the
    average is in the model), and at checkpoint events (the model holds what ``save_weights`` names). It keeps three
    fp32 copies of the trainable parameters: theta_0, the EMA and the BEMA; theta_0 takes half of that where bf16 holds
    it exactly.

    Args:
        update_freq (str, optional): phi, the time from one update to the next, counted from ``update_after``. Any of
            Composer's time units but seconds. Default: ``'400ba'``, or ``'1ba'`` with ``half_life``.
        update_after (str): tau, the burn-in: when theta_0 and the EMA are taken. Default: ``'0ba'``, the weights before
            the first step.
        ema_power (float, optional): kappa, at least 0. ``0`` keeps no history, and ``None`` switches the EMA off, so
            that only the correction is added to the newest weights. Default: ``0.5``.
        bias_power (float, optional): eta, at least 0. ``0`` corrects fully for ever, a large value fades the
            correction, and ``None`` switches it off. Default: ``0.2``.
        lag (float): rho, the virtual starting age, in steps times ``multiplier``. Default: ``10``.
        multiplier (float): gamma, the pace at which both schedules age. Default: ``1``.
        min_ema_multiplier (float): m, the floor of beta, in [0, 1]. Default: ``0``.
        half_life (str, optional): A time in such a unit. Replaces ``ema_power`` by the constant rate
            :math:`\beta = 1 - 2^{-\text{elapsed} / \text{half\_life}}`. Default: ``None``.
        update_interval (str, optional): Another name of ``update_freq``.
        update_ref_model (bool): Whether the frozen reference model of a run, such as that of :class:`.DPO`, becomes the
            BEMA weights every ``ref_model_update_freq``, counted from ``ref_model_update_after``, where the first such
            update is due. It stays as it is as long as there are no BEMA weights. Default: ``False``.
        ref_model_update_freq (str): A time in such a unit. Default: ``'400ba'``.
        ref_model_update_after (str): A time in such a unit. Default: ``'0ba'``.
        eval_labels (list[str], optional): The labels of the evaluators that see the average; ``'predict'`` stands for
            ``Trainer.predict``. Several averages can watch one run with labels of their own. Default: ``None``, all.
        save_weights (str, optional): Which weights callbacks find in the model at a checkpoint event, ``'average'`` or
            ``'training'``. A checkpoint holds both either way. Default: ``'average'`` if this is the only average of
            the run, else ``'training'``.
        state_in_checkpoint (bool): Whether checkpoints hold the buffers. Without them a run cannot be resumed from the
            average. Default: ``True``.
        average_buffers (bool): Whether persistent floating-point module buffers (BatchNorm's statistics) follow the
            EMA. If not they are copied, as integer ones are. Default: ``True``.
        nonfinite (str): What an update does about a NaN or an infinity in the weights: ``'raise'`` an error, ``'skip'``
            the update and log the count, or ``'ignore'`` it. Default: ``'raise'``.
        device (str, optional): Where the average is kept, ``'cpu'`` for host memory. Default: beside the parameters.
            In host memory, of a model on a GPU, there is one more copy of the weights, in their dtype. An update fills
            it, for which training waits, and goes on from there in a thread of its own; evaluations, checkpoints and
            the next update wait for that. The copy and the buffers, but for snapshots, are pinned, and torch rounds
            the size of a pinned tensor up to a power of two.

    Raises:
        ValueError: If a setting is out of its range, ``update_freq`` and ``update_interval`` are both given, or the run
            does not fit: a second BEMA, shared evaluators or checkpoints, a unit that the run does not count, no
            reference model to update.
        TypeError: If a time is no time string, or a number none.
        FloatingPointError: During training, if a weight is not finite and ``nonfinite='raise'``.

    Example:
        .. testcode::

            from composer import Trainer
            from composer_bema import BEMA

            trainer = Trainer(
                model=model,
                train_dataloader=train_dataloader,
                eval_dataloader=eval_dataloader,
                max_duration='1ep',
                algorithms=[BEMA(update_interval='10ba')],
            )
    """

    def __init__(
        self,
        update_freq: Optional[Union[str, Time]] = None,
        update_after: Union[str, Time] = f'{DEFAULTS.update_after}ba',
        ema_power: Optional[float] = DEFAULTS.ema_power,
        bias_power: Optional[float] = DEFAULTS.bias_power,
        lag: float = DEFAULTS.lag,
        multiplier: float = DEFAULTS.multiplier,
        min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
        half_life: Optional[Union[str, Time]] = None,
        *,
        update_interval: Optional[Union[str, Time]] = None,
        update_ref_model: bool = False,
        ref_model_update_freq: Union[str, Time] = f'{DEFAULTS.update_freq}ba',
        ref_model_update_after: Union[str, Time] = f'{DEFAULTS.update_after}ba',
        eval_labels: Optional[Sequence[str]] = None,
        save_weights: Optional[SaveWeights] = None,
        state_in_checkpoint: bool = True,
        average_buffers: bool = True,
        nonfinite: NonFinite = 'raise',
        device: Optional[Union[torch.device, str]] = None,
    ) -> None:
        references = ReferenceUpdates(ref_model_update_freq, ref_model_update_after)
        self.reference_updates = references if update_ref_model else None
        super().__init__(
            bema_rule(ema_power, bias_power, lag, multiplier, min_ema_multiplier, in_half_lives(half_life)),
            settings={
                'ema_power': ema_power,
                'bias_power': bias_power,
                'lag': lag,
                'multiplier': multiplier,
                'min_ema_multiplier': min_ema_multiplier,
                **_reference_settings(self.reference_updates),
            },
            update_freq=parse_update_freq(update_freq, update_interval, f'{default_update_freq(half_life)}ba'),
            update_after=update_after,
            half_life=half_life,
            eval_labels=eval_labels,
            save_weights=save_weights,
            state_in_checkpoint=state_in_checkpoint,
            average_buffers=average_buffers,
            nonfinite=nonfinite,
            device=device,
        )

    def get_bema_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts the BEMA weights into a model and returns it, as :meth:`.WeightAveraging.get_averaged_model` does."""
        return self.get_averaged_model(model)

    def saved_state(self) -> dict[str, Any]:
        saved = super().saved_state()
        return saved if self.reference_updates is None else {**saved, _REFERENCE: self.reference_updates.state_dict()}

    def restore(self, saved: dict[str, Any], state: State) -> None:
        super().restore(saved, state)
        if self.reference_updates is not None and _REFERENCE in saved:
            self.reference_updates.load_state_dict(saved[_REFERENCE])

    def _forget_run(self) -> None:
        super()._forget_run()
        if self.reference_updates is not None:
            self.reference_updates.forget_run()

    def _times(self) -> dict[str, Time]:
        given = super()._times()
        if self.reference_updates is not None:
            given['ref_model_update_freq'] = self.reference_updates.update_freq
            given['ref_model_update_after'] = self.reference_updates.update_after
        return given

    def _start_fit(self, event: Event, state: State, logger: Logger) -> None:
        super()._start_fit(event, state, logger)
        if self.reference_updates is not None:
            self.reference_updates.start(state)

    def _follow_reset_clocks(self, state: State) -> None:
        origin = self._origin
        super()._follow_reset_clocks(state)
        if self.reference_updates is not None and self._origin is not origin:
            self.reference_updates.follow_reset_clocks(state)

    def _end_step(self, event: Event, state: State, logger: Logger) -> None:
        """Updates the average first, so that a reference that is due has the newest."""
        super()._end_step(event, state, logger)
        references = self.reference_updates
        if references is not None and references.advance(state) and self.average.num_updates:
            references.apply(self.average.average(), state)
            logger.log_metrics({f'{self._prefix}/num_ref_model_updates': references.num_updates})


class EMA(WeightAveraging):
    r"""Evaluates and checkpoints a run with the exponential moving average of its weights.

    .. math::
        EMA_t = (1 - \beta_t) EMA_{t - \phi} + \beta_t \theta_t

    The rate is the power schedule of :class:`BEMA`, or constant with ``half_life`` or ``smoothing``. It keeps one fp32
    copy of the trainable parameters.

    ``EMA(half_life='10ba', update_after='1ba')`` is ``composer.algorithms.EMA(half_life='10ba')``, whose average starts
    from the weights after the first step. Composer's updates at multiples of its interval, this one at
    ``update_after`` plus multiples.

    Args:
        half_life (str, optional): A time, as in :class:`BEMA`.
        smoothing (float, optional): Replaces the schedule by the constant beta = 1 - smoothing at every update, in
            [0, 1), whatever ``update_freq`` is, which then defaults to ``'1ba'``.

    The other arguments, and the errors, are those of :class:`BEMA`.

    Example:
        .. testcode::

            from composer_bema import EMA

            algorithm = EMA(half_life='1000ba', update_freq='10ba')
    """

    def __init__(
        self,
        half_life: Optional[Union[str, Time]] = None,
        smoothing: Optional[float] = None,
        update_freq: Optional[Union[str, Time]] = None,
        update_after: Union[str, Time] = f'{DEFAULTS.update_after}ba',
        ema_power: Optional[float] = DEFAULTS.ema_power,
        lag: float = DEFAULTS.lag,
        multiplier: float = DEFAULTS.multiplier,
        min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
        *,
        update_interval: Optional[Union[str, Time]] = None,
        eval_labels: Optional[Sequence[str]] = None,
        save_weights: Optional[SaveWeights] = None,
        state_in_checkpoint: bool = True,
        average_buffers: bool = True,
        nonfinite: NonFinite = 'raise',
        device: Optional[Union[torch.device, str]] = None,
    ) -> None:
        super().__init__(
            ema_rule(ema_power, lag, multiplier, min_ema_multiplier, in_half_lives(half_life), smoothing),
            settings={
                'smoothing': smoothing,
                'ema_power': ema_power,
                'lag': lag,
                'multiplier': multiplier,
                'min_ema_multiplier': min_ema_multiplier,
            },
            update_freq=parse_update_freq(
                update_freq, update_interval, f'{default_update_freq(half_life, smoothing)}ba'
            ),
            update_after=update_after,
            half_life=half_life,
            eval_labels=eval_labels,
            save_weights=save_weights,
            state_in_checkpoint=state_in_checkpoint,
            average_buffers=average_buffers,
            nonfinite=nonfinite,
            device=device,
        )

    def get_ema_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts the EMA weights into a model and returns it, as :meth:`.WeightAveraging.get_averaged_model` does."""
        return self.get_averaged_model(model)


def _reference_settings(references: Optional[ReferenceUpdates]) -> dict[str, Union[str, bool, None]]:
    # With None for what is switched off, so that a checkpoint's settings are compared with it.
    return {
        'update_ref_model': None if references is None else True,
        'ref_model_update_freq': None if references is None else references.update_freq.to_timestring(),
        'ref_model_update_after': None if references is None else references.update_after.to_timestring(),
    }
