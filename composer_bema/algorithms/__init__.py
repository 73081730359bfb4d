# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Weight averages as Composer Algorithms."""

from composer_bema.algorithms.bema import BEMA, EMA
from composer_bema.algorithms.weight_averaging import WeightAveraging

__all__ = ['BEMA', 'EMA', 'WeightAveraging']
