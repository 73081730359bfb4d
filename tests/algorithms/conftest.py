# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Runs a test for every average."""

from collections.abc import Callable

import pytest

from composer_bema.algorithms import WeightAveraging
from tests.algorithms.family import FAMILY


@pytest.fixture(params=FAMILY)
def make_average(request: pytest.FixtureRequest) -> Callable[..., WeightAveraging]:
    """Makes one of the averages, of arguments that all of them have."""
    return FAMILY[request.param]
