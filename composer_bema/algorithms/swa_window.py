# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The mean of a whole period of training as a Composer Algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from composer import State, Time

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
            Composer's time units but seconds. Default: ``'5ba'``.
        horizon (str): What is averaged, a multiple of ``period``. Default: ``'500ba'``.
        period (str, optional): After what the running mean starts again, a multiple of ``update_freq``. Default:
            ``horizon``.

    A resumed run has to keep the number of updates in a period, and of periods in the horizon. The other arguments, and
    the errors, are those of :class:`.BEMA`. Updates that ``nonfinite='skip'`` leaves out make their period longer.

    Raises:
        ValueError: During training, if ``update_freq`` passes more than once in a step, so that periods would not be as
            long as they say.

    Example:
        .. testcode::

            from composer_bema import SWAWindow

            algorithm = SWAWindow(update_freq='5ba', horizon='500ba')
    """

    def __init__(
        self,
        update_freq: Optional[Union[str, Time]] = None,
        horizon: Union[str, Time] = f'{DEFAULTS.swa_horizon}ba',
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
        freq = parse_update_freq(update_freq, update_interval, f'{DEFAULTS.swa_update_freq}ba')
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

    def _intervals_passed(self, state: State) -> int:
        passed = super()._intervals_passed(state)
        if passed > 1:
            raise ValueError(
                f"update_freq='{self.update_freq.to_timestring()}' passes {passed} times in a step, in which SWAWindow "
                'has one update: give a longer one.',
            )
        return passed
