# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The steps of a rule folded over a list of checkpoints: how much each weighs in the average, in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from composer_bema.averaging.rules import THETA, Lerp, LinearStep, Row, Rule

__all__ = ['fold', 'fold_back']


def fold(rule: Rule, start: int, steps: Sequence[int]) -> np.ndarray:
    r"""Returns the coefficients c of the average as a combination of the weights, :math:`\sum_i c_i \theta_i`.

    Args:
        rule (Rule): The average.
        start (int): The step whose weights all buffers start as.
        steps (Sequence[int]): The steps of the updates, rising. Half-lives count in steps.

    Returns:
        np.ndarray: In float64, of the shape (updates, 1 + updates). A row is the average after an update; the first
        column is for the weights at ``start``, and the others are for those at ``steps``.

    Example:
        >>> fold(ema_rule(smoothing=0.75), 0, [1, 2])
        array([[0.75  , 0.25  , 0.    ],
               [0.5625, 0.1875, 0.25  ]])
    """
    units = np.eye(1 + len(steps))
    values: dict[str, Any] = dict.fromkeys(rule.buffers, units[0])
    rows = np.empty((len(steps), 1 + len(steps)))
    for index, (step, previous) in enumerate(zip(steps, [start, *steps], strict=False)):
        values[THETA] = units[1 + index]
        for row in rule.linear_step(step, step - previous, index).rows:
            values[row.target] = _combined(row, values)
        rows[index] = values[rule.average]
    return rows


def fold_back(linear_steps: Sequence[LinearStep], average: str) -> np.ndarray:
    """Returns the last row of :func:`fold`, in time and memory that grow with the updates and not with their square.

    Args:
        linear_steps (Sequence[LinearStep]): The updates, from the first one on.
        average (str): The buffer that is the average.

    Returns:
        np.ndarray: In float64, of the shape (1 + updates,); the first number is for the weights that all buffers start
        as, and the others are for those at the updates.
    """
    # What the average owes to each operand, as it was before the updates that have been undone.
    owed: defaultdict[str, float] = defaultdict(float, {average: 1.0})
    coefficients = np.zeros(1 + len(linear_steps))
    for index in range(len(linear_steps), 0, -1):
        for row in reversed(linear_steps[index - 1].rows):
            amount = owed.pop(row.target, 0.0)
            for operand, weight in _weights(row):
                owed[operand] += weight * amount
        coefficients[index] = owed.pop(THETA, 0.0)
    coefficients[0] = sum(owed.values())
    return coefficients


def _weights(row: Row) -> tuple[tuple[str, float], ...]:
    if isinstance(row, Lerp):
        return (row.target, 1 - row.weight), (row.source, row.weight)
    return (row.base, 1.0), (row.minuend, row.scale), (row.subtrahend, -row.scale)


def _combined(row: Row, values: dict[str, Any]) -> np.ndarray:
    if isinstance(row, Lerp):
        return (1 - row.weight) * values[row.target] + row.weight * values[row.source]
    return values[row.base] + row.scale * (values[row.minuend] - values[row.subtrahend])
