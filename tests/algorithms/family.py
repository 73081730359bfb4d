# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Every average, as the tests make it that all of them have to pass: by keywords, with an `update_freq`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

from composer import Time

from composer_bema import BEMA, DEMA, EMA, LAWA, OUEMA, SWAWindow
from composer_bema import functional as cf
from composer_bema.algorithms import WeightAveraging

__all__ = ['FAMILY', 'FUNCTIONS', 'REPLACING']


def make_swa_window(update_freq: str, periods: int = 1, **kwargs: Any) -> SWAWindow:
    """Two updates a period."""
    period = Time.from_input(update_freq) * 2
    return SWAWindow(update_freq, period * periods, period, **kwargs)


def init_swa_window(model: Any, update_freq: int, periods: int = 1, **kwargs: Any) -> cf.LoopState:
    period = update_freq * 2
    return cf.init_swa_window(model, update_freq=update_freq, horizon=period * periods, period=period, **kwargs)


REPLACING = 'LAWA to train on from'

FAMILY: dict[str, Callable[..., WeightAveraging]] = {
    'BEMA': BEMA,
    'EMA': EMA,
    'DEMA': DEMA,
    'OUEMA': OUEMA,
    'LAWA': functools.partial(LAWA, window=2),
    'LAWA on disk': functools.partial(LAWA, window=3, snapshot_folder=tempfile.gettempdir()),
    REPLACING: functools.partial(LAWA, window=2, replace_training_weights=True),
    'SWAWindow': make_swa_window,
    'SWAWindow of two periods': functools.partial(make_swa_window, periods=2),
}

# The same, for loops by hand.
FUNCTIONS: dict[str, Callable[..., cf.LoopState]] = {
    'BEMA': cf.init_bema,
    'EMA': cf.init_ema,
    'DEMA': cf.init_dema,
    'OUEMA': cf.init_ouema,
    'LAWA': functools.partial(cf.init_lawa, window=2),
    'LAWA on disk': functools.partial(cf.init_lawa, window=3, snapshot_folder=tempfile.gettempdir()),
    'SWAWindow': init_swa_window,
    'SWAWindow of two periods': functools.partial(init_swa_window, periods=2),
}
