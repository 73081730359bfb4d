# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Schedules with long constant parts, along which averages are taken, as Composer schedulers.

Composer asks for the learning rate of the next step before it counts the last one. As with its own schedulers, the
first two steps of a run therefore both have the multiplier of t = 0, the third has that of t = 1, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar, Union, get_args

from composer import State, Time, TimeUnit
from composer.optim import ComposerScheduler
from composer.optim.scheduler import _convert_time

from composer_bema.algorithms.times import check_unit, parse_time
from composer_bema.averaging.decay import require_number
from composer_bema.averaging.decay_shapes import LearningRateDecay, decay_factor

__all__ = ['CosineAnnealingWithConstantTailScheduler', 'WarmupStableDecayScheduler']


class _WarmupAndDecayScheduler(ComposerScheduler):
    """A linear warmup from ``alpha_i`` to 1 and a later decay to ``alpha_f``, constant between them and afterwards."""

    # Of the times by their names, what has to hold for the parts to follow each other.
    requirement: ClassVar[str]

    def __init__(
        self,
        times: Mapping[str, Time],
        alpha_i: float,
        alpha_f: float,
        decay: LearningRateDecay,
        scale_warmup: bool,
    ) -> None:
        require_number('alpha_i', alpha_i, at_most=1)
        require_number('alpha_f', alpha_f, at_most=1)
        self.times = times
        self.alpha_i = alpha_i
        self.alpha_f = alpha_f
        self.decay: LearningRateDecay = decay
        self.scale_warmup = scale_warmup
        self._check_before_the_run()

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        lengths = self._lengths_in(state, ssr)
        warmup, start, end = self._moments(lengths)
        if ssr != 1 and state.timestamp.batch == 0:
            # The Trainer scales max_duration only after it has called this for the first time, so that the lengths may
            # not go together yet. Whatever they are, a schedule starts with its warmup or at 1.
            return self.alpha_i if warmup > 0 else 1.0
        self._check_room(lengths)
        now = state.timestamp.get(lengths['t_max'].unit).value
        if now < warmup:
            return self.alpha_i + (1 - self.alpha_i) * float(now / warmup)
        over = float((now - start) / (end - start))
        return decay_factor(self.decay, min(max(over, 0.0), 1.0), self.alpha_f)

    def _moments(self, lengths: Mapping[str, Time]) -> tuple[Fraction, Fraction, Fraction]:
        """Returns when the warmup ends, and when the decay starts and ends, in the unit of the lengths."""
        raise NotImplementedError

    def _lengths_in(self, state: State, ssr: float) -> dict[str, Time]:
        """Returns the times in the one unit that they are counted in by a run."""
        lengths = {name: self._length(name, time, state, ssr) for name, time in self.times.items() if time.value > 0}
        self._check_units({name: length.unit for name, length in lengths.items()})
        # Nothing is nothing in every unit.
        return {name: lengths.get(name, Time(0, lengths['t_max'].unit)) for name in self.times}

    def _length(self, name: str, time: Time, state: State, ssr: float) -> Time:
        check_unit(name, time, state)
        try:
            return _convert_time(time, state, ssr=1.0 if name == 't_warmup' and not self.scale_warmup else ssr)
        except RuntimeError as error:
            raise ValueError(
                f"{name}='{time}' has to be counted in steps, but how many steps the epochs of this run have is not "
                'known: use another unit.',
            ) from error

    def _check_before_the_run(self) -> None:
        """Checks what can be told of the times without the numbers of a run."""
        some = {name: time for name, time in self.times.items() if time.value > 0}
        counted = {name: time.unit for name, time in some.items() if time.unit != TimeUnit.DURATION}
        self._check_units({n: TimeUnit.BATCH if unit == TimeUnit.EPOCH else unit for n, unit in counted.items()})
        if len({time.unit for time in some.values()}) == 1:
            self._check_room(self.times)

    def _check_units(self, units: Mapping[str, TimeUnit]) -> None:
        for one, other in pairwise(units):
            if units[one] != units[other]:
                raise ValueError(
                    f"{one}='{self.times[one]}' and {other}='{self.times[other]}' must be counted in one unit, but are "
                    f"counted in '{units[one].value}' and '{units[other].value}'.",
                )

    def _check_room(self, lengths: Mapping[str, Time]) -> None:
        warmup, start, end = self._moments(lengths)
        if not warmup <= start < end:
            times = [
                f"{name}='{time}'" + (f' ({lengths[name]} in this run)' if str(lengths[name]) != str(time) else '')
                for name, time in self.times.items()
            ]
            raise ValueError(f'{", ".join(times)}: {self.requirement}.')


class WarmupStableDecayScheduler(_WarmupAndDecayScheduler):
    r"""Warms the learning rate up, keeps it constant, and decays it at the end (arXiv 2405.18392).

    The learning rate multiplier :math:`\alpha` is

    .. math::
        \alpha(t) = \begin{cases}
            \alpha_i + (1 - \alpha_i) \, t / t_{warmup}, & \text{if } t < t_{warmup} \\
            1, & \text{if } t_{warmup} \le t \le t_{max} - t_{decay} \\
            \alpha_f + (1 - \alpha_f) \, w(u), & \text{if } t_{max} - t_{decay} < t < t_{max} \\
            \alpha_f & \text{otherwise}
        \end{cases}

    where :math:`u = (t - t_{max} + t_{decay}) / t_{decay}` is the part of the decay that is over, and w its shape, see
    ``averaging.decay_shapes.decay_factor``; the exponential decay is :math:`\alpha_f^u`.

    All times may be in any of Composer's units but seconds, and must come to one unit in the run: epochs are counted in
    steps, and a fraction of the run in the unit of ``max_duration``, rounded down. A ``scale_schedule_ratio`` scales
    ``t_decay`` and ``t_max``, and the warmup only with ``scale_warmup`` or if it is a fraction of the run.

    Args:
        t_warmup (str | Time): The time of the warmup. Default: ``'0ba'``, none.
        t_decay (str | Time): The time of the decay, more than 0. Default: ``'0.1dur'``.
        t_max (str | Time): When the decay ends, at least ``t_warmup`` and ``t_decay`` together. Default: ``'1dur'``.
        alpha_i (float): The multiplier at t = 0 if there is a warmup, in [0, 1]. The published schedule has 0.01.
            Default: ``0.0``.
        alpha_f (float): The multiplier that the decay ends at, in [0, 1]; above 0 for the exponential decay.
            Default: ``0.0``.
        decay (str): The shape of the decay: ``'linear'``, ``'1-sqrt'``, ``'cosine'``, ``'exponential'``, ``'square'``
            or ``'mirror-cosine'``. Default: ``'linear'``.
        scale_warmup (bool): Whether a ``scale_schedule_ratio`` scales a warmup that is no fraction of the run, too.
            Default: ``False``.

    Raises:
        TypeError: If a time is no time string, or a multiplier no number.
        ValueError: If a setting is out of its range; at the latest when a run starts, if the times do not fit into each
            other, or are counted in different units or in one that the run does not count.

    Example:
        .. testcode::

            from composer import Trainer
            from composer_bema import WarmupStableDecayScheduler

            trainer = Trainer(
                model=model,
                train_dataloader=train_dataloader,
                max_duration='1ep',
                optimizers=optimizer,
                schedulers=WarmupStableDecayScheduler(t_warmup='10ba', t_decay='0.2dur', decay='1-sqrt'),
            )
    """

    requirement = 't_decay must be more than 0, and t_warmup and t_decay together at most t_max'

    def __init__(
        self,
        t_warmup: Union[str, Time] = '0ba',
        t_decay: Union[str, Time] = '0.1dur',
        t_max: Union[str, Time] = '1dur',
        alpha_i: float = 0.0,
        alpha_f: float = 0.0,
        decay: LearningRateDecay = 'linear',
        scale_warmup: bool = False,
    ) -> None:
        if decay not in get_args(LearningRateDecay):
            raise ValueError(f'decay must be one of {", ".join(get_args(LearningRateDecay))}, but is {decay!r}.')
        times = {
            't_warmup': parse_time('t_warmup', t_warmup, positive=False),
            't_decay': parse_time('t_decay', t_decay, positive=True),
            't_max': parse_time('t_max', t_max, positive=True),
        }
        super().__init__(times, alpha_i, alpha_f, decay, scale_warmup)
        if decay == 'exponential' and alpha_f == 0:
            raise ValueError(f"alpha_f must be above 0 where decay='exponential', but is {alpha_f}.")

    def _moments(self, lengths: Mapping[str, Time]) -> tuple[Fraction, Fraction, Fraction]:
        warmup, decay, end = (Fraction(str(length.value)) for length in lengths.values())
        return warmup, end - decay, end


class CosineAnnealingWithConstantTailScheduler(_WarmupAndDecayScheduler):
    r"""Decays the learning rate along a cosine, with an initial warmup, and keeps it constant at the end.

    .. seealso::
        Without a tail it is Composer's :class:`~composer.optim.CosineAnnealingWithWarmupScheduler`.

    The learning rate multiplier :math:`\alpha` is

    .. math::
        \alpha(t) = \begin{cases}
            \alpha_i + (1 - \alpha_i) \, t / t_{warmup}, & \text{if } t < t_{warmup} \\
            \alpha_f + (1 - \alpha_f) \, (1 + \cos(\pi u)) / 2, & \text{if } t_{warmup} \le t < t_{max} - t_{tail} \\
            \alpha_f & \text{otherwise}
        \end{cases}

    where :math:`u = (t - t_{warmup}) / (t_{max} - t_{tail} - t_{warmup})` is the part of the cosine that is over. Where
    this schedule is written with ``div_factor`` and ``final_div_factor``, as PyTorch's ``OneCycleLR`` does, ``alpha_i``
    is 1 / ``div_factor`` and ``alpha_f`` is 1 / (``div_factor`` * ``final_div_factor``).

    Units, and what a ``scale_schedule_ratio`` does, are as in :class:`WarmupStableDecayScheduler`.

    Args:
        t_warmup (str | Time): The time of the warmup. Default: ``'0ba'``, none.
        t_tail (str | Time): The time before ``t_max`` in which the multiplier is ``alpha_f``. Default: ``'0.2dur'``.
        t_max (str | Time): When the schedule ends, more than ``t_warmup`` and ``t_tail`` together; the multiplier stays
            ``alpha_f`` afterwards. Default: ``'1dur'``.
        alpha_i (float): The multiplier at t = 0 if there is a warmup, in [0, 1]. Default: ``0.0``.
        alpha_f (float): The multiplier of the tail, in [0, 1]. With 0 the tail trains nothing. Default: ``0.1``.
        scale_warmup (bool): Whether a ``scale_schedule_ratio`` scales a warmup that is no fraction of the run, too.
            Default: ``False``.

    Raises:
        TypeError: If a time is no time string, or a multiplier no number.
        ValueError: If a setting is out of its range; at the latest when a run starts, if the times do not fit into each
            other, or are counted in different units or in one that the run does not count.

    Example:
        .. testcode::

            from composer import Trainer
            from composer_bema import CosineAnnealingWithConstantTailScheduler

            trainer = Trainer(
                model=model,
                train_dataloader=train_dataloader,
                max_duration='1ep',
                optimizers=optimizer,
                schedulers=CosineAnnealingWithConstantTailScheduler(t_warmup='10ba', t_tail='0.2dur'),
            )
    """

    requirement = 't_warmup and t_tail together must be less than t_max'

    def __init__(
        self,
        t_warmup: Union[str, Time] = '0ba',
        t_tail: Union[str, Time] = '0.2dur',
        t_max: Union[str, Time] = '1dur',
        alpha_i: float = 0.0,
        alpha_f: float = 0.1,
        scale_warmup: bool = False,
    ) -> None:
        times = {
            't_warmup': parse_time('t_warmup', t_warmup, positive=False),
            't_tail': parse_time('t_tail', t_tail, positive=False),
            't_max': parse_time('t_max', t_max, positive=True),
        }
        super().__init__(times, alpha_i, alpha_f, 'cosine', scale_warmup)

    def _moments(self, lengths: Mapping[str, Time]) -> tuple[Fraction, Fraction, Fraction]:
        warmup, tail, end = (Fraction(str(length.value)) for length in lengths.values())
        return warmup, warmup, end - tail
