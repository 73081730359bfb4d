# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The double EMA of the weights as a Composer Algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from composer import Time

from composer_bema.algorithms.times import in_half_lives, parse_update_freq
from composer_bema.algorithms.weight_averaging import SaveWeights, WeightAveraging
from composer_bema.averaging.defaults import DEFAULTS, default_update_freq
from composer_bema.averaging.rules import dema_rule
from composer_bema.averaging.state import NonFinite

__all__ = ['DEMA']


class DEMA(WeightAveraging):
    r"""Evaluates and checkpoints a run with the double EMA of its weights (Mulloy, 1994; arXiv 2508.00180).

    .. math::
        EMA_t &= (1 - \beta_t) EMA_{t - \phi} + \beta_t \theta_t \\
        EEMA_t &= (1 - \beta_t) EEMA_{t - \phi} + \beta_t EMA_t \\
        DEMA_t &= 2 EMA_t - EEMA_t

    On a straight line it does not lag. The rate is the power schedule of :class:`.BEMA`, or constant with ``half_life``
    or ``smoothing``. It keeps three fp32 copies of the trainable parameters, and runs on the events of :class:`.BEMA`.

    Args:
        half_life (str, optional): A time, as in :class:`.BEMA`.
        smoothing (float, optional): As in :class:`.EMA`.

    The other arguments, and the errors, are those of :class:`.BEMA`.

    Raises:
        ValueError: If ``ema_power`` is None without another rate.

    Example:
        .. testcode::

            from composer_bema import DEMA

            algorithm = DEMA(half_life='1000ba', update_freq='10ba')
    """

    def __init__(
        self,
        update_freq: Optional[Union[str, Time]] = None,
        update_after: Union[str, Time] = f'{DEFAULTS.update_after}ba',
        ema_power: Optional[float] = DEFAULTS.ema_power,
        lag: float = DEFAULTS.lag,
        multiplier: float = DEFAULTS.multiplier,
        min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
        half_life: Optional[Union[str, Time]] = None,
        smoothing: Optional[float] = None,
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
            dema_rule(ema_power, lag, multiplier, min_ema_multiplier, in_half_lives(half_life), smoothing),
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
