# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Weight averages as Composer Algorithms."""

from composer_bema.algorithms.bema import BEMA, EMA
from composer_bema.algorithms.dema import DEMA
from composer_bema.algorithms.lawa import LAWA
from composer_bema.algorithms.ouema import OUEMA
from composer_bema.algorithms.swa_window import SWAWindow
from composer_bema.algorithms.weight_averaging import WeightAveraging

__all__ = ['BEMA', 'DEMA', 'EMA', 'LAWA', 'OUEMA', 'SWAWindow', 'WeightAveraging']
