# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of a step as their docstrings define them, slow and obvious."""

from typing import Any

from composer_bema.averaging.rules import Lerp, LinearStep


def apply_rows(step: LinearStep, values: dict[str, Any]) -> None:
    """Applies the rows in place to values of any kind: numbers, arrays, coefficients."""
    for row in step.rows:
        if isinstance(row, Lerp):
            target = values[row.target]
            values[row.target] = target + row.weight * (values[row.source] - target)
        else:
            values[row.target] = values[row.base] + row.scale * (values[row.minuend] - values[row.subtrahend])
