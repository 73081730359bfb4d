# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The shapes in which a learning rate decays, as pure functions of the part of the decay that is over.

A schedule multiplies the learning rate by them; a merge of snapshots that stands for a decay has its weights from them,
see :func:`.merge_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ['LearningRateDecay', 'decay_factor']

LearningRateDecay = Literal['linear', '1-sqrt', 'cosine', 'exponential', 'square', 'mirror-cosine']

# w(u); the exponential decay has none, since its way depends on where it ends.
_DECAYS: dict[LearningRateDecay, Callable[[float], float]] = {
    'linear': lambda u: 1 - u,
    '1-sqrt': lambda u: 1 - math.sqrt(u),
    'cosine': lambda u: (1 + math.cos(math.pi * u)) / 2,
    'square': lambda u: 1 - u**2,
    # The cosine's mirror image in the straight line.
    'mirror-cosine': lambda u: 2 * (1 - u) - (1 + math.cos(math.pi * u)) / 2,
}


def decay_factor(decay: LearningRateDecay, u: float, final: float = 0.0) -> float:
    r"""Returns what is left of the learning rate after the part u of a decay from 1 to F.

    .. math::
        F + (1 - F) w(u), \quad \text{and } F^u \text{ for the exponential decay}

    It is 1 at u = 0 and F at u = 1, exactly, and never rises between them.

    Args:
        decay (str): ``'linear'``: w(u) = 1 - u. ``'1-sqrt'``: w(u) = 1 - sqrt(u). ``'cosine'``:
            w(u) = (1 + cos(pi u)) / 2. ``'square'``: w(u) = 1 - u^2. ``'mirror-cosine'``:
            w(u) = 2 (1 - u) - (1 + cos(pi u)) / 2. ``'exponential'``.
        u (float): The part of the decay that is over, in [0, 1].
        final (float): F, in [0, 1]. With 0 the exponential decay is over at once. Default: ``0``.
    """
    return final**u if decay == 'exponential' else final + (1 - final) * _DECAYS[decay](u)
