# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How much the weights of each past step weigh in the averages of a run, told by its settings and its metrics."""

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from composer.core import Time, TimeUnit

from composer_bema.algorithms.weight_averaging import WeightAveraging
from composer_bema.averaging.coefficients import fold_back

__all__ = ['Clock', 'Weighing', 'weigh']

# How far a logged alpha or beta may be from that of the settings: clocks are whole numbers, so that there is no noise.
_TOLERANCE = 1e-9


class Clock:
    """What a run had counted after each of its steps, as its metrics say.

    Args:
        records: The lines of a metrics file.
        max_duration: The run's length, which fractions of it are counted in.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], max_duration: int | str) -> None:
        self.max_duration = Time.from_input(max_duration, 'ep')
        self.first_step = 0
        """The step of the first metrics; not 0 where the run went on from another's checkpoint."""
        # Epochs at the last line of a step, at which an epoch that it ends is over.
        self._counts: dict[TimeUnit, dict[int, int]] = {TimeUnit.EPOCH: {}, TimeUnit.TOKEN: {}, TimeUnit.SAMPLE: {}}
        for number, record in enumerate(records):
            if number == 0:
                self.first_step = record['batch']
            for unit, key in ((TimeUnit.EPOCH, 'epoch'), (TimeUnit.TOKEN, 'token'), (TimeUnit.SAMPLE, 'time/sample')):
                if key in record:
                    self._counts[unit][record['batch']] = record[key]

    def count(self, unit: TimeUnit, step: int) -> int:
        """What the run had counted after a step.

        Raises:
            ValueError: The metrics do not say it.
        """
        if unit == TimeUnit.BATCH:
            return step
        if step not in self._counts.get(unit, {}):
            raise ValueError(f'the metrics do not say what the run had counted in {unit.name.lower()}s at step {step}')
        return self._counts[unit][step]

    def length(self, time: Time) -> tuple[TimeUnit, Fraction]:
        """The unit in which a time is counted, and its length there: epochs and fractions of them are steps.

        Raises:
            ValueError: The metrics do not say how long an epoch is.
        """
        if time.unit == TimeUnit.DURATION:
            unit, whole = self.length(self.max_duration)
            return unit, Fraction(str(time.value)) * whole
        if time.unit == TimeUnit.EPOCH:
            ends = [step for step, epoch in self._counts[TimeUnit.EPOCH].items() if epoch == 1]
            if not ends:
                raise ValueError('the metrics do not say how many steps an epoch has')
            return TimeUnit.BATCH, Fraction(str(time.value)) * min(ends)
        return time.unit, Fraction(str(time.value))

    def first_step_at(self, time: Time) -> int:
        """The first step at which a time has come.

        Raises:
            ValueError: The metrics do not say when that was.
        """
        if time.value == 0:
            return 0
        unit, length = self.length(time)
        if unit == TimeUnit.BATCH:
            return math.ceil(length)
        steps = sorted(self._counts.get(unit, {}))
        index = bisect.bisect_left(steps, length, key=lambda step: self._counts[unit][step])
        if index == len(steps):
            raise ValueError(f"the metrics do not say at which step '{time.to_timestring()}' had come")
        return steps[index]


@dataclass(frozen=True)
class Weighing:
    """What an average is made of after its last update.

    Args:
        steps: The step that it starts from, and those of its updates.
        coefficients: What the weights at each of them weigh, float64, of the same length; their sum is 1.
    """

    steps: list[int]
    coefficients: np.ndarray


def weigh(average: WeightAveraging, updates: Mapping[int, Mapping[str, float]], clock: Clock) -> Weighing:
    """Weigh the past of an average.

    Args:
        average: The algorithm, as the run's settings build it.
        updates: What the run has logged of each update, by its step: ``num_updates`` and the coefficients.
        clock: The run's.

    Raises:
        ValueError: The settings and the metrics do not tell; the message is the reason, without a capital or a full
            stop.
    """
    steps = sorted(updates)
    if [updates[step]['num_updates'] for step in steps] != list(range(1, len(steps) + 1)):
        raise ValueError('some of its updates are not in these metrics, or were counted anew')
    start = max(clock.first_step_at(average.update_after), clock.first_step)
    if start >= steps[0]:
        raise ValueError(f'its first update, at step {steps[0]}, is not after step {start}, where it should have begun')
    elapsed = _elapsed([start, *steps], average.half_life, clock)
    rule = average.average.rule
    linear_steps = []
    for index, (step, time) in enumerate(zip(steps, elapsed, strict=True)):
        linear_step = rule.linear_step(step, time, index)
        for name, value in linear_step.coefficients.items():
            if not math.isclose(updates[step].get(name, math.nan), value, rel_tol=_TOLERANCE):
                raise ValueError(f'the {name} that it logged at step {step} is not that of its present settings')
        linear_steps.append(linear_step)
    return Weighing([start, *steps], fold_back(linear_steps, rule.average))


def _elapsed(steps: list[int], half_life: Time | None, clock: Clock) -> list[float]:
    """The time from each step to the next one in half-lives, as the average itself has counted it."""
    if half_life is None:
        return [1.0] * (len(steps) - 1)
    unit, length = clock.length(half_life)
    counts = [clock.count(unit, step) for step in steps]
    return [float((after - before) / length) for before, after in zip(counts, counts[1:], strict=False)]
