# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Which checkpoints make up which averages: settings and steps become rows of coefficients over all checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from composer_bema.averaging.coefficients import fold
from composer_bema.averaging.rules import Rule
from composer_bema.averaging.windows import SWAWindow, Window
from composer_bema.offline.settings import Setting

__all__ = ['Average', 'plan_averages', 'weight_curves', 'weight_table']

log = logging.getLogger(__name__)

# How many steps a message lists.
_MOST_LISTED = 10


@dataclass(frozen=True)
class Average:
    """One average of a trajectory.

    Args:
        setting (Setting): What it is.
        step (int): The step of its last update.
        coefficients (np.ndarray): What each checkpoint weighs in the parameters, float64, of the shape (checkpoints,).
        statistics (np.ndarray): The same for the statistics of normalization layers.
    """

    setting: Setting
    step: int
    coefficients: np.ndarray
    statistics: np.ndarray


def plan_averages(setting: Setting, steps: Sequence[int], at: Sequence[int] = ()) -> list[Average]:
    """Returns the averages of a setting at some of its updates.

    Args:
        setting (Setting): The average.
        steps (Sequence[int]): The steps of the checkpoints, rising.
        at (Sequence[int]): The steps of the updates after which it is wanted. Default: the last one.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range, or the checkpoints that it needs are not there.
    """
    updates = _updates(setting, steps)
    rule = setting.build(setting.update_freq or _spacing([setting.update_after, *updates]))
    _look_for_gaps(setting, rule, updates)
    parameters = fold(rule, setting.update_after, updates)
    statistics = fold(rule.statistics, setting.update_after, updates)
    averages = []
    for step in dict.fromkeys(at) or updates[-1:]:
        if step not in updates:
            raise ValueError(f'{setting} has no update at step {step}, but at {_listed(updates)}.')
        index = updates.index(step)
        _warn_of_part(setting, rule, step, index + 1)
        rows = (
            _over_all(row[index], setting.update_after, updates, steps, setting) for row in (parameters, statistics)
        )
        averages.append(Average(setting, step, *rows))
    return averages


def weight_curves(averages: Sequence[Average], steps: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    """Returns what the checkpoints weigh, as points (step, coefficient) by the averages' names."""
    return {
        _name(average, averages): [(step, c) for step, c in zip(steps, average.coefficients.tolist(), strict=True)]
        for average in averages
    }


def weight_table(averages: Sequence[Average], steps: Sequence[int]) -> dict[str, list[float]]:
    """Returns what the checkpoints weigh, as columns by their headers."""
    columns = {_name(average, averages): average.coefficients.tolist() for average in averages}
    return {'step': list(steps), **columns}


def _name(average: Average, averages: Sequence[Average]) -> str:
    several = len({other.step for other in averages}) > 1
    return f'{average.setting}, step {average.step}' if several else str(average.setting)


def _updates(setting: Setting, steps: Sequence[int]) -> list[int]:
    tau, phi = setting.update_after, setting.update_freq
    updates = [step for step in steps if step > tau and (phi is None or (step - tau) % phi == 0)]
    if not updates:
        wanted = f'a multiple of {phi} steps after {tau}' if phi else f'after step {tau}'
        raise ValueError(
            f'{setting} has no update: no checkpoint, of those of the steps {_listed(steps)}, is {wanted}.'
        )
    return updates


def _look_for_gaps(setting: Setting, rule: Rule, updates: Sequence[int]) -> None:
    phi = setting.update_freq
    missing = sorted({*range(setting.update_after + phi, updates[-1], phi)} - {*updates}) if phi else []
    if missing and isinstance(rule, SWAWindow):
        raise ValueError(
            f'{setting} counts steps, and there are no checkpoints of the steps {_listed(missing)}: start after them, '
            'or take lawa, which counts checkpoints.'
        )
    if missing:
        log.warning('%s: there are no checkpoints of the steps %s; it goes on without.', setting, _listed(missing))


def _spacing(steps: Sequence[int]) -> Optional[int]:
    """Returns the steps from one update to the next, or None if they differ."""
    # The start counts as an update only if there is but one.
    spacings = {b - a for a, b in zip(steps[1:], steps[2:], strict=False)} or {steps[1] - steps[0]}
    return spacings.pop() if len(spacings) == 1 else None


def _warn_of_part(setting: Setting, rule: Rule, step: int, count: int) -> None:
    wanted = rule.size if isinstance(rule, Window) else 0
    if isinstance(rule, SWAWindow):
        wanted = rule.updates * rule.periods
    if count < wanted:
        log.warning('%s at step %d: its window is not full, and holds %d checkpoints.', setting, step, count)


def _over_all(
    row: np.ndarray, start: int, updates: Sequence[int], steps: Sequence[int], setting: Setting
) -> np.ndarray:
    """Returns the coefficients of the start and the updates as a row over all checkpoints."""
    column = {step: index for index, step in enumerate(steps)}
    if row[0] != 0 and start not in column:
        if start == 0:
            raise ValueError(
                f'{setting} starts from the weights before the first step, of which there is no checkpoint: name them '
                f'as the initial model (--initial-model), or start later (--update-after {steps[0]}).'
            )
        raise ValueError(
            f'{setting} starts from the weights at step {start}, of which there is no checkpoint: update_after must be '
            f'one of {_listed(steps)}.'
        )
    over_all = np.zeros(len(steps))
    if start in column:
        over_all[column[start]] = row[0]
    over_all[[column[step] for step in updates]] = row[1:]
    return over_all


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    if len(shown) > _MOST_LISTED:
        shown[_MOST_LISTED // 2 : -_MOST_LISTED // 2] = ['...']
    return ', '.join(shown)
