# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The default settings, in the one place that the functional face, the Algorithms and the recipes read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

__all__ = ['DEFAULTS', 'Defaults', 'default_update_freq']


@dataclass(frozen=True)
class Defaults:
    """Defaults of the paper (arXiv 2508.00180) and of TRL's ``BEMACallback``, and for windows; times count steps."""

    update_freq: int = 400
    update_after: int = 0
    ema_power: Optional[float] = 0.5
    bias_power: Optional[float] = 0.2
    lag: float = 10.0
    multiplier: float = 1.0
    min_ema_multiplier: float = 0.0
    lawa_update_freq: int = 1000
    lawa_window: int = 10
    swa_update_freq: int = 5
    swa_horizon: int = 500


DEFAULTS = Defaults()


def default_update_freq(*constant_rates: object) -> int:
    """Returns phi in steps; with a constant rate, such as a half-life that is not ``None``, every step is an update."""
    return DEFAULTS.update_freq if all(rate is None for rate in constant_rates) else 1
