# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The numbers that an evaluation finds, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

__all__ = ['Measurement', 'mean_over']


@dataclass(frozen=True)
class Measurement:
    """A number that was measured of one set of weights.

    Args:
        task (str): What it was measured on, such as ``'boolq'`` or ``'loss-held_out'``.
        metric (str): What it is, such as ``'accuracy'``.
        value (float): The number.
        standard_error (float, optional): That of the mean over questions or blocks of text; None where there is none.
        count (int): The questions or blocks.
    """

    task: str
    metric: str
    value: float
    standard_error: Optional[float]
    count: int


def mean_over(task: str, metric: str, values: Sequence[float]) -> Measurement:
    """Returns the mean of values that are independent of each other, with its standard error if there are several."""
    count = len(values)
    mean = math.fsum(values) / count
    error = None
    if count > 1:
        error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Measurement(task, metric, mean, error, count)
