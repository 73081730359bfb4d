# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The steps of a rule folded over a list of checkpoints: how much each weighs in the average, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from composer_bema.averaging.rules import THETA, Lerp, Row, Rule

__all__ = ['fold']


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


def _combined(row: Row, values: dict[str, Any]) -> np.ndarray:
    if isinstance(row, Lerp):
        return (1 - row.weight) * values[row.target] + row.weight * values[row.source]
    return values[row.base] + row.scale * (values[row.minuend] - values[row.subtrahend])
