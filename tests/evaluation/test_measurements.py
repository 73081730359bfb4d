# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Means and their standard errors."""

import math

import pytest

from composer_bema.evaluation.measurements import Measurement, mean_over


def test_mean_and_standard_error():
    # The sample variance of 0, 1, 1, 0 is 1/3, and that of a mean of four a quarter of it.
    assert mean_over('task', 'accuracy', [0.0, 1.0, 1.0, 0.0]) == Measurement(
        'task', 'accuracy', 0.5, pytest.approx(math.sqrt(1 / 12)), 4
    )


def test_one_value_has_no_standard_error():
    assert mean_over('task', 'accuracy', [0.25]) == Measurement('task', 'accuracy', 0.25, None, 1)
