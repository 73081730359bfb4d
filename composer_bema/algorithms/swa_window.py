# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The mean of a whole period of training as a Composer Algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from composer import Time

from composer_bema.algorithms.times import count_in, parse_time, parse_update_freq
from composer_bema.algorithms.weight_averaging import SaveWeights, WeightAveraging
from composer_bema.averaging import windows
from composer_bema.averaging.defaults import DEFAULTS
from composer_bema.averaging.state import NonFinite

__all__ = ['SWAWindow']


class SWAWindow(WeightAveraging):
    """Evaluates and checkpoints a run with the mean of its weights over the last whole period (arXiv 2405.18392).

    A running mean takes in the weights at every update, and starts again when its period ends. The average is the mean
    of the last whole periods, as many as ``horizon`` holds; until the first one ends it is the running mean. With
    ``save_interval`` set to the horizon checkpoints hold one such mean after the other. Beside the average it keeps the
    running mean and one mean a period, fp32 copies of the trainable parameters. Those that froze are averaged on. It
    runs on the events of :class:`.BEMA`.

    Composer's own ``SWA`` averages the end of a run with a learning rate of its own, and trains on from the average;
    this one leaves training alone.

    Args:
        update_freq (str, optional): phi, the time from one update to the next, counted from ``update_after``. Any of
            Composer's time units. Default: ``'5ba'``.
        horizon (str): What is averaged, a multiple of ``period``. Default: ``'500ba'``.
        period (str, optional): After what the running mean starts again, a multiple of ``update_freq``. Default:
            ``horizon``.

    A resumed run has to keep these three. The other arguments, and the errors, are those of :class:`.BEMA`.

    Example:
        .. testcode::

            from composer_bema import SWAWindow

            algorithm = SWAWindow(update_freq='5ba', horizon='500ba')
    """

    fixed_settings = ('update_freq', 'horizon', 'period')

    def __init__(
        self,
        update_freq: Optional[Union[str, Time]] = None,
        horizon: Union[str, Time] = '500ba',
        period: Optional[Union[str, Time]] = None,
        update_after: Union[str, Time] = f'{DEFAULTS.update_after}ba',
        *,
        update_interval: Optional[Union[str, Time]] = None,
        eval_labels: Optional[Sequence[str]] = None,
        save_weights: Optional[SaveWeights] = None,
        state_in_checkpoint: bool = True,
        average_buffers: bool = True,
        nonfinite: NonFinite = 'raise',
        device: Optional[Union[torch.device, str]] = None,
    ) -> None:
        freq = parse_update_freq(update_freq, update_interval, '5ba')
        whole = parse_time('horizon', horizon, positive=True)
        part = whole if period is None else parse_time('period', period, positive=True)
        updates = count_in('horizon' if period is None else 'period', part, 'update_freq', freq)
        super().__init__(
            windows.SWAWindow(updates, count_in('horizon', whole, 'period', part)),
            settings={'horizon': whole.to_timestring(), 'period': part.to_timestring()},
            update_freq=freq,
            update_after=update_after,
            eval_labels=eval_labels,
            save_weights=save_weights,
            state_in_checkpoint=state_in_checkpoint,
            average_buffers=average_buffers,
            nonfinite=nonfinite,
            device=device,
        )
