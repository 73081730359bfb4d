# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The arithmetic of weight averages, with torch alone: schedules, rules, kernels and the state of one average."""

from composer_bema.averaging.coefficients import fold
from composer_bema.averaging.decay import ConstantDecay, Decay, HalfLifeDecay, PowerDecay
from composer_bema.averaging.defaults import DEFAULTS
from composer_bema.averaging.rules import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    LinearStep,
    Rule,
    bema_rule,
    dema_rule,
    ema_rule,
    ouema_rule,
)
from composer_bema.averaging.state import AverageState
from composer_bema.averaging.windows import SWAWindow, Window

__all__ = [
    'BEMA',
    'DEFAULTS',
    'DEMA',
    'EMA',
    'OUEMA',
    'AverageState',
    'ConstantDecay',
    'Decay',
    'HalfLifeDecay',
    'LinearStep',
    'PowerDecay',
    'Rule',
    'SWAWindow',
    'Window',
    'bema_rule',
    'dema_rule',
    'ema_rule',
    'fold',
    'ouema_rule',
]
