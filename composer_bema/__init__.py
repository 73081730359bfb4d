# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Weight averaging without the lag (BEMA) for people who train with MosaicML Composer.

Importing this package imports neither torch nor Composer. The names below are looked up when they are first touched, so
that `composer_bema.functional` serves where Composer is not installed, and `composer-bema --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from composer_bema.version import __version__

if TYPE_CHECKING:
    from composer_bema import functional
    from composer_bema.algorithms import BEMA, DEMA, EMA, LAWA, OUEMA, SWAWindow
    from composer_bema.formats.completeness import newest_complete_checkpoint
    from composer_bema.lr_schedulers import CosineAnnealingWithConstantTailScheduler, WarmupStableDecayScheduler
    from composer_bema.preference import DPO
    from composer_bema.training.callbacks import FlopsMonitor, HuggingFaceCheckpointer

__all__ = [
    'BEMA',
    'DEMA',
    'DPO',
    'EMA',
    'LAWA',
    'OUEMA',
    'CosineAnnealingWithConstantTailScheduler',
    'FlopsMonitor',
    'HuggingFaceCheckpointer',
    'SWAWindow',
    'WarmupStableDecayScheduler',
    '__version__',
    'functional',
    'newest_complete_checkpoint',
]

# The modules that the names are found in.
_HOMES = {
    **dict.fromkeys(('BEMA', 'DEMA', 'EMA', 'LAWA', 'OUEMA', 'SWAWindow'), 'algorithms'),
    'CosineAnnealingWithConstantTailScheduler': 'lr_schedulers',
    'DPO': 'preference',
    'FlopsMonitor': 'training.callbacks',
    'HuggingFaceCheckpointer': 'training.callbacks',
    'WarmupStableDecayScheduler': 'lr_schedulers',
    'newest_complete_checkpoint': 'formats.completeness',
}


def __getattr__(name: str) -> Any:
    if name == 'functional':
        return import_module('composer_bema.functional')
    if name in _HOMES:
        return getattr(import_module(f'composer_bema.{_HOMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
