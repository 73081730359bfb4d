# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The EMA of de-biased weights as a Composer Algorithm."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Optional, Union

import torch
from composer import Time, TimeUnit

from composer_bema.algorithms.times import in_half_lives, parse_update_freq
from composer_bema.algorithms.weight_averaging import SaveWeights, WeightAveraging
from composer_bema.averaging.defaults import DEFAULTS, default_update_freq
from composer_bema.averaging.rules import ouema_rule
from composer_bema.averaging.state import NonFinite

__all__ = ['OUEMA']


class OUEMA(WeightAveraging):
    r"""Evaluates and checkpoints a run with the EMA of its de-biased weights (arXiv 2508.00180).

    .. math::
        u_t &= (\theta_t - \alpha_t \theta_0) / (1 - \alpha_t), & \alpha_t &= (1 + \max(t - \tau + \rho, 1))^{-\eta} \\
        OUEMA_t &= (1 - \beta_t) OUEMA_{t - \phi} + \beta_t u_t, & \beta_t &= \max((\rho + \gamma t)^{-\kappa}, m)

    Training is taken for an Ornstein-Uhlenbeck process, which forgets theta_0 as alpha says. Alpha counts from the
    burn-in, as in the paper's code, and beta from the start of the run, as in :class:`.BEMA`, on whose events it runs.
    It keeps two fp32 copies of the trainable parameters; theta_0 takes half of one where bf16 holds it exactly.

    Args:
        bias_power (float, optional): eta, more than 0. A small value takes the weights for heavily biased for long, and
            ``None`` for not biased, so that what is left is the EMA. Default: ``0.2``.

    The other arguments, and the errors, are those of :class:`.BEMA`.

    Example:
        .. testcode::

            from composer_bema import OUEMA

            algorithm = OUEMA(update_freq='10ba', bias_power=0.5)
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
        eval_labels: Optional[Sequence[str]] = None,
        save_weights: Optional[SaveWeights] = None,
        state_in_checkpoint: bool = True,
        average_buffers: bool = True,
        nonfinite: NonFinite = 'raise',
        device: Optional[Union[torch.device, str]] = None,
    ) -> None:
        self._rule_since = functools.partial(
            ouema_rule, ema_power, bias_power, lag, multiplier, min_ema_multiplier, in_half_lives(half_life)
        )
        super().__init__(
            self._rule_since(update_after=0),
            settings={
                'ema_power': ema_power,
                'bias_power': bias_power,
                'lag': lag,
                'multiplier': multiplier,
                'min_ema_multiplier': min_ema_multiplier,
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

    def _set_origin(self, clocks: dict[str, int]) -> None:
        super()._set_origin(clocks)
        self.average.change_rule(self._rule_since(update_after=clocks[TimeUnit.BATCH.value]))
