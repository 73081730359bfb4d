# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages over a window: the newest snapshots (LAWA, and merges in a decay's stead), and running means of periods.

They are linear recurrences too: snapshots and means of periods are buffers, which updates overwrite in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, get_args

from composer_bema.averaging.decay_shapes import decay_factor
from composer_bema.averaging.rules import THETA, Lerp, LinearStep

__all__ = ['DecayShape', 'SWAWindow', 'Window', 'merge_weights', 'require_count', 'swa_window_rule']

DecayShape = Literal['linear', '1-sqrt', 'cosine']


def merge_weights(decay: DecayShape, count: int) -> list[float]:
    r"""Returns the weights of ``count`` snapshots, oldest first, whose mean stands for a decay of the learning rate.

    Between the snapshots :math:`\theta_0, \ldots, \theta_k` a decay would have multiplied the steps by
    :math:`w_j = w(j / (k + 1))`, and :math:`\theta_0 + \sum_j w_j (\theta_j - \theta_{j-1})` is the mean with the
    weights :math:`c_0 = 1 - w_1`, :math:`c_j = w_j - w_{j+1}` and :math:`c_k = w_k` (WSM, arXiv 2507.17634; and
    Megatron-LM's weighted merge). The linear decay makes all of them equal.

    Args:
        decay (str): w, which is the :func:`.decay_factor` of the same name: ``'linear'``, ``'1-sqrt'`` or ``'cosine'``.
        count (int): k + 1, at least 1.
    """
    multipliers = [decay_factor(decay, j / count) for j in range(count)] + [0.0]
    return [multipliers[j] - multipliers[j + 1] for j in range(count)]


@dataclass(frozen=True)
class Window:
    """A mean of the newest snapshots, one taken at every update; of as many as there are before the window is full.

    Args:
        size (int): The number of snapshots, at least 1.
        decay (str): Their weights, see ``merge_weights``. ``'linear'`` is the plain mean, which is LAWA
            (arXiv 2209.14981, 2306.03241). Default: ``'linear'``.

    Raises:
        TypeError: If ``size`` is no whole number.
        ValueError: If a setting is out of its range.
    """

    size: int
    decay: DecayShape = 'linear'
    constants = ()
    average = 'window'

    def __post_init__(self) -> None:
        require_count('window', self.size)
        if self.decay not in get_args(DecayShape):
            raise ValueError(f'decay must be one of {", ".join(get_args(DecayShape))}, but is {self.decay!r}.')

    @property
    def layout(self) -> dict[str, int]:
        return {'window': self.size}

    @property
    def snapshots(self) -> tuple[str, ...]:
        return tuple(f'snapshot_{slot}' for slot in range(self.size))

    @property
    def buffers(self) -> tuple[str, ...]:
        return (*self.snapshots, self.average)

    @property
    def statistics(self) -> Window:
        return self

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        newest = num_updates % self.size
        held = min(num_updates + 1, self.size)
        rows = [Lerp(f'snapshot_{newest}', THETA, 1.0)]
        total = 0.0
        for age, weight in enumerate(reversed(merge_weights(self.decay, held))):
            total += weight
            rows.append(Lerp(self.average, f'snapshot_{(newest - age) % self.size}', weight / total))
        return LinearStep(tuple(rows), {})


@dataclass(frozen=True)
class SWAWindow:
    """The running mean of a period, which starts again when the period ends; the average is that of whole periods.

    It is the weight averager of *Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations* (arXiv
    2405.18392). Until the first period ends the average is its running mean.

    Args:
        updates (int): The updates in a period, at least 1.
        periods (int): The whole periods that the average goes over, at least 1. Default: ``1``.

    Raises:
        TypeError: If a setting is no whole number.
        ValueError: If a setting is out of its range.
    """

    updates: int
    periods: int = 1
    constants = ()
    snapshots = ()
    average = 'swa'

    def __post_init__(self) -> None:
        require_count('updates', self.updates)
        require_count('periods', self.periods)

    @property
    def layout(self) -> dict[str, int]:
        return {'updates in a period': self.updates, 'periods': self.periods}

    @property
    def buffers(self) -> tuple[str, ...]:
        return ('running', *(f'period_{slot}' for slot in range(self.periods)), self.average)

    @property
    def statistics(self) -> SWAWindow:
        return self

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        whole, position = divmod(num_updates, self.updates)
        rows = [Lerp('running', THETA, 1 / (position + 1))]
        if position + 1 == self.updates:
            rows.append(Lerp(f'period_{whole % self.periods}', 'running', 1.0))
            held = min(whole + 1, self.periods)
            rows += [Lerp(self.average, f'period_{slot}', 1 / (slot + 1)) for slot in range(held)]
        elif whole == 0:
            rows.append(Lerp(self.average, 'running', 1.0))
        return LinearStep(tuple(rows), {})


def swa_window_rule(horizon: int, update_freq: int, period: Optional[int] = None) -> SWAWindow:
    """Returns the mean of the last ``horizon`` steps that make up whole periods.

    Args:
        horizon (int): In steps; a multiple of ``period``.
        update_freq (int): phi, the steps between two updates.
        period (int, optional): In steps; a multiple of ``update_freq``. Default: ``horizon``.

    Raises:
        TypeError: If one is no whole number.
        ValueError: If one is below 1, or no multiple of what it has to be.
    """
    require_count('horizon', horizon)
    require_count('update_freq', update_freq)
    period = horizon if period is None else period
    require_count('period', period)
    if period % update_freq:
        name = 'horizon' if period == horizon else 'period'
        raise ValueError(f'{name} is {period}, which is no multiple of the {update_freq} steps between two updates.')
    if horizon % period:
        raise ValueError(f'horizon is {horizon}, which is no multiple of period, {period}.')
    return SWAWindow(period // update_freq, horizon // period)


def require_count(name: str, value: object) -> None:
    """Checks that a setting is a whole number of at least 1.

    Raises:
        TypeError: If it is none.
        ValueError: If it is below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} must be a whole number, but is {value!r}.')
    if value < 1:
        raise ValueError(f'{name} must be at least 1, but is {value}.')
