# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

r"""The schedules alpha_t and beta_t, as pure functions of the optimizer step.

Three schedules are in print under nearly the same formula, and their code differs:

* the paper's and TRL's, which is ours: :math:`(\rho + \gamma t)^{-\kappa}` with t counted from the run's start;
* the reference *offline* code's: :math:`(1 + \gamma \max(t - \tau + \rho, 1))^{-\kappa}`, without gamma in alpha. It is
  the same class with another origin and offset, see :func:`reference_decay`;
* the reference *online* code's, where gamma is a prefactor that can push the weight of the newest weights above 1. A
  weight above 1 is no average, so that one cannot be expressed here.

At kappa 0.5, rho 10, gamma 2, tau 0 and t 10 the three give 0.183, 0.156 and 2.0.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ['ConstantDecay', 'Decay', 'HalfLifeDecay', 'PowerDecay', 'reference_decay', 'require_number']


def require_number(name: str, value: Any, at_most: float = math.inf) -> None:
    """Checks that a setting is a finite number of at least 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative, not finite, or more than ``at_most``.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number, but is {value!r}.')
    if not (math.isfinite(value) and 0 <= float(value) <= at_most):
        bounds = 'at least 0 and finite' if at_most == math.inf else f'between 0 and {at_most:g}'
        raise ValueError(f'{name} must be {bounds}, but is {value!r}.')


class Decay(Protocol):
    """A coefficient in [0, 1] for one update."""

    def __call__(self, step: int, elapsed: float) -> float:
        """Returns the coefficient.

        Args:
            step (int): t, the optimizer steps done since the start of the run.
            elapsed (float): The time since the previous update, in the unit of the half-life.
        """
        ...


@dataclass(frozen=True)
class PowerDecay:
    r"""Decays as a power of the age: :math:`\min(1, \max(\text{floor}, (\rho + \gamma a_t)^{-p}))`.

    The age is :math:`a_t = \max(t - \text{origin}, \text{min\_age})`, in optimizer steps.

    Args:
        power (float): p, at least 0. ``0`` is the constant 1, a large value fades fast.
        lag (float): rho, the virtual age at the origin, in steps times ``multiplier``; at least 0.
        multiplier (float): gamma, the pace of the decay; at least 0.
        origin (float): The step from which the age counts.
        min_age (float): The age is never below this, in steps.
        floor (float): The coefficient is never below this; in [0, 1].

    Raises:
        TypeError: If a setting is no number.
        ValueError: If a setting is out of its range.
    """

    power: float
    lag: float = 10.0
    multiplier: float = 1.0
    origin: float = 0
    min_age: float = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ('power', 'lag', 'multiplier'):
            require_number(name, getattr(self, name))
        require_number('floor', self.floor, at_most=1)

    def __call__(self, step: int, elapsed: float = 1.0) -> float:
        base = float(self.lag + self.multiplier * max(step - self.origin, self.min_age))
        # Below 1 the power would exceed 1 (or divide by zero), and alpha and beta never do.
        return max(base**-self.power, self.floor) if base > 1 else 1.0


def reference_decay(
    power: float,
    lag: float,
    update_after: int,
    multiplier: float = 1.0,
    floor: float = 0.0,
) -> PowerDecay:
    r"""Returns the schedule of the reference offline code: :math:`(1 + \gamma \max(t - \tau + \rho, 1))^{-p}`.

    Args:
        power (float): p.
        lag (float): rho, in steps.
        update_after (int): tau, in steps.
        multiplier (float): gamma.
        floor (float): The coefficient is never below this; in [0, 1].
    """
    return PowerDecay(power, 1.0, multiplier, origin=update_after - lag, min_age=1, floor=floor)


@dataclass(frozen=True)
class HalfLifeDecay:
    r"""The constant-rate EMA: :math:`1 - 2^{-\text{elapsed} / \text{half\_life}}`.

    Args:
        half_life (float): The time after which a contribution has halved, in the unit that ``elapsed`` comes in.
            Must be positive and finite.

    Raises:
        ValueError: If ``half_life`` is not a positive number.
    """

    half_life: float

    def __post_init__(self) -> None:
        require_number('half_life', self.half_life)
        if self.half_life == 0:
            raise ValueError('half_life must be positive, but is 0.')

    def __call__(self, step: int, elapsed: float) -> float:
        return -math.expm1(-elapsed / self.half_life * math.log(2))


@dataclass(frozen=True)
class ConstantDecay:
    """The same coefficient at every update.

    Args:
        value (float): The coefficient, in [0, 1].

    Raises:
        ValueError: If ``value`` is out of its range.
    """

    value: float

    def __post_init__(self) -> None:
        require_number('value', self.value, at_most=1)

    def __call__(self, step: int, elapsed: float) -> float:
        return self.value
