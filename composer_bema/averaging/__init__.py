# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The arithmetic of weight averages, with torch alone: schedules, rules, kernels and the state of one average."""

from composer_bema.averaging.decay import ConstantDecay, Decay, HalfLifeDecay, PowerDecay
from composer_bema.averaging.defaults import DEFAULTS
from composer_bema.averaging.rules import BEMA, EMA, LinearStep, Rule, bema_rule, ema_rule
from composer_bema.averaging.state import AverageState

__all__ = [
    'BEMA',
    'DEFAULTS',
    'EMA',
    'AverageState',
    'ConstantDecay',
    'Decay',
    'HalfLifeDecay',
    'LinearStep',
    'PowerDecay',
    'Rule',
    'bema_rule',
    'ema_rule',
]
