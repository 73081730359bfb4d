# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The averages as scalar arithmetic: a step number in, the coefficients of one update out. No tensor is touched here.

Every average is a linear recurrence over named buffers. A rule turns the step into a `LinearStep`, a short list of rows
applied in order, and everything else follows from it: the kernels apply the rows to tensors, and folding the rows over
the steps of a list of checkpoints gives the weight of each checkpoint in the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional, Protocol, Union

from composer_bema.averaging.decay import (
    ConstantDecay,
    Decay,
    HalfLifeDecay,
    PowerDecay,
    reference_decay,
    require_number,
)
from composer_bema.averaging.defaults import DEFAULTS

__all__ = [
    'BEMA',
    'DEMA',
    'EMA',
    'OUEMA',
    'THETA',
    'THETA_0',
    'Difference',
    'Latest',
    'Lerp',
    'LinearStep',
    'Row',
    'Rule',
    'as_difference',
    'bema_rule',
    'dema_rule',
    'ema_rule',
    'ouema_rule',
]

# The operands of a row: the training weights, and the buffers that a rule keeps. These names reach checkpoints.
THETA = 'theta'
THETA_0 = 'theta_0'


@dataclass(frozen=True)
class Lerp:
    """The row ``target <- target + weight (source - target)``."""

    target: str
    source: str
    weight: float


@dataclass(frozen=True)
class Difference:
    """The row ``target <- base + scale (minuend - subtrahend)``."""

    target: str
    base: str
    scale: float
    minuend: str
    subtrahend: str


Row = Union[Lerp, Difference]


def as_difference(row: Row) -> Difference:
    """Returns a row as the one kind that some kernels know. A copy has scale 0, and one minuend and subtrahend."""
    if isinstance(row, Difference):
        return row
    if row.weight == 1:
        return Difference(row.target, row.source, 0.0, row.source, row.source)
    # torch.lerp starts from the nearer end.
    if abs(row.weight) < 0.5:
        return Difference(row.target, row.target, row.weight, row.source, row.target)
    return Difference(row.target, row.source, row.weight - 1, row.source, row.target)


@dataclass(frozen=True)
class LinearStep:
    """One update: rows applied in order, each of which sees the rows before it, and the coefficients they came from."""

    rows: tuple[Row, ...]
    coefficients: Mapping[str, float]


class Rule(Protocol):
    """What an average is, without a tensor. All buffers start as the weights at the burn-in."""

    @property
    def buffers(self) -> tuple[str, ...]:
        """The buffers kept for each averaged tensor."""
        ...

    @property
    def constants(self) -> tuple[str, ...]:
        """Those of the buffers that no update writes to."""
        ...

    @property
    def snapshots(self) -> tuple[str, ...]:
        """Those of the buffers that updates only overwrite, with the weights as they are."""
        ...

    @property
    def layout(self) -> Mapping[str, int]:
        """The settings without which saved buffers mean something else, where updates depend on how many there were.

        Of such a rule no parameter may sit out an update.
        """
        ...

    @property
    def average(self) -> str:
        """The buffer that is the average."""
        ...

    @property
    def statistics(self) -> Rule:
        """The rule for floating-point module buffers, such as BatchNorm's running statistics."""
        ...

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        """Returns an update.

        Args:
            step (int): t, the optimizer steps done since the start of the run.
            elapsed (float): The time since the previous update, in the unit of the half-life.
            num_updates (int): The updates done before.
        """
        ...


@dataclass(frozen=True)
class EMA:
    r"""The exponential moving average, :math:`EMA_t = (1 - \beta_t) EMA_{t - \phi} + \beta_t \theta_t`.

    Args:
        beta (Decay): The weight of the newest weights.
    """

    beta: Decay
    buffers = ('ema',)
    constants = ()
    snapshots = ()
    layout = {}
    average = 'ema'

    @property
    def statistics(self) -> EMA:
        return self

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        beta = self.beta(step, elapsed)
        return LinearStep((Lerp('ema', THETA, beta),), {'beta': beta})


@dataclass(frozen=True)
class BEMA:
    r"""The bias-corrected EMA, :math:`BEMA_t = EMA_t + \alpha_t (\theta_t - \theta_0)` (arXiv 2508.00180, Algorithm 1).

    Args:
        alpha (Decay): The strength of the correction.
        beta (Decay): The weight of the newest weights in the EMA.
    """

    alpha: Decay
    beta: Decay
    buffers = (THETA_0, 'ema', 'bema')
    constants = (THETA_0,)
    snapshots = ()
    layout = {}
    average = 'bema'

    @property
    def statistics(self) -> EMA:
        # A variance must stay positive, and a correction can push it below zero.
        return EMA(self.beta)

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        alpha, beta = self.alpha(step, elapsed), self.beta(step, elapsed)
        rows = (Lerp('ema', THETA, beta), Difference('bema', 'ema', alpha, THETA, THETA_0))
        return LinearStep(rows, {'alpha': alpha, 'beta': beta})


@dataclass(frozen=True)
class DEMA:
    r"""The double EMA, :math:`DEMA_t = 2 EMA_t - EMA(EMA)_t`, whose lag on a straight line is zero (Mulloy, 1994).

    Args:
        beta (Decay): The weight of the newest weights in either EMA.
    """

    beta: Decay
    buffers = ('ema', 'ema_of_ema', 'dema')
    constants = ()
    snapshots = ()
    layout = {}
    average = 'dema'

    @property
    def statistics(self) -> EMA:
        # Its coefficients can be negative, and a variance must stay positive.
        return EMA(self.beta)

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        beta = self.beta(step, elapsed)
        rows = (
            Lerp('ema', THETA, beta),
            Lerp('ema_of_ema', 'ema', beta),
            Difference('dema', 'ema', 1.0, 'ema', 'ema_of_ema'),
        )
        return LinearStep(rows, {'beta': beta})


@dataclass(frozen=True)
class OUEMA:
    r"""The EMA of de-biased weights: of :math:`u_t = (\theta_t - \alpha_t \theta_0) / (1 - \alpha_t)`.

    It takes the training for an Ornstein-Uhlenbeck process, which forgets theta_0 as alpha says (arXiv 2508.00180).

    Args:
        alpha (Decay): How much of theta_0 is left; below 1.
        beta (Decay): The weight of the newest of them in the EMA.
    """

    alpha: Decay
    beta: Decay
    buffers = (THETA_0, 'ouema')
    constants = (THETA_0,)
    snapshots = ()
    layout = {}
    average = 'ouema'

    @property
    def statistics(self) -> EMA:
        return EMA(self.beta)

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        alpha, beta = self.alpha(step, elapsed), self.beta(step, elapsed)
        if alpha >= 1:
            raise ValueError(f'OUEMA divides by 1 - alpha, and alpha is {alpha} at step {step}: raise bias_power.')
        # u_t is theta_t + alpha / (1 - alpha) (theta_t - theta_0), which needs no buffer.
        correction = beta * alpha / (1 - alpha)
        rows = (Lerp('ouema', THETA, beta), Difference('ouema', 'ouema', correction, THETA, THETA_0))
        return LinearStep(rows, {'alpha': alpha, 'beta': beta})


@dataclass(frozen=True)
class Latest:
    """The weights at the last update, for what cannot be averaged, such as integer module buffers."""

    buffers = ('latest',)
    constants = ()
    snapshots = ()
    layout = {}
    average = 'latest'

    @property
    def statistics(self) -> Latest:
        return self

    def linear_step(self, step: int, elapsed: float, num_updates: int) -> LinearStep:
        return LinearStep((Lerp('latest', THETA, 1.0),), {})


def ema_rule(
    ema_power: Optional[float] = DEFAULTS.ema_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    half_life: Optional[float] = None,
    smoothing: Optional[float] = None,
) -> EMA:
    """Returns the EMA rule of these settings.

    Args:
        ema_power (float, optional): kappa; ``None`` means no EMA, so that the average is the newest weights.
        lag (float): rho, in steps.
        multiplier (float): gamma.
        min_ema_multiplier (float): The floor of beta, in [0, 1].
        half_life (float, optional): Replaces ``ema_power`` by the constant beta = 1 - 2^(-elapsed / half_life).
        smoothing (float, optional): Replaces ``ema_power`` by the constant beta = 1 - smoothing, in [0, 1).

    Raises:
        TypeError: If a setting is no number.
        ValueError: If a setting is out of its range, ``half_life`` and ``smoothing`` are both given, or
            ``ema_power`` or ``min_ema_multiplier`` is beside one of them and would do nothing.
    """
    if half_life is not None and smoothing is not None:
        raise ValueError('half_life and smoothing both fix the rate of the EMA: give one of them.')
    _require_numbers(lag=lag, multiplier=multiplier)
    require_number('min_ema_multiplier', min_ema_multiplier, at_most=1)
    constant = next((n for n, v in (('half_life', half_life), ('smoothing', smoothing)) if v is not None), None)
    idle = {'ema_power': ema_power not in (None, DEFAULTS.ema_power), 'min_ema_multiplier': min_ema_multiplier != 0}
    if constant is not None and any(idle.values()):
        name = next(n for n in idle if idle[n])
        raise ValueError(f'{name} has no effect beside {constant}: leave out one of them.')
    if smoothing is not None:
        require_number('smoothing', smoothing, at_most=1)
        if smoothing == 1:
            raise ValueError('smoothing must be below 1, or the average would never move.')
        return EMA(ConstantDecay(1.0 - smoothing))
    if half_life is not None:
        return EMA(HalfLifeDecay(half_life))
    if ema_power is None:
        return EMA(ConstantDecay(1.0))
    _require_numbers(ema_power=ema_power)
    return EMA(PowerDecay(ema_power, lag, multiplier, floor=min_ema_multiplier))


def bema_rule(
    ema_power: Optional[float] = DEFAULTS.ema_power,
    bias_power: Optional[float] = DEFAULTS.bias_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    half_life: Optional[float] = None,
) -> Union[BEMA, EMA]:
    """Returns the BEMA rule of these settings, which without a bias correction is the EMA.

    Args:
        bias_power (float, optional): eta; ``0`` corrects fully for ever, a large value fades the correction, ``None``
            switches it off.

    The other arguments, and the errors, are those of :func:`ema_rule`.
    """
    ema = ema_rule(ema_power, lag, multiplier, min_ema_multiplier, half_life)
    if bias_power is None:
        return ema
    _require_numbers(bias_power=bias_power)
    return BEMA(alpha=PowerDecay(bias_power, lag, multiplier), beta=ema.beta)


def dema_rule(
    ema_power: Optional[float] = DEFAULTS.ema_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    half_life: Optional[float] = None,
    smoothing: Optional[float] = None,
) -> DEMA:
    """Returns the double EMA; its arguments and errors are those of :func:`ema_rule`, but it is nothing without an EMA.

    Raises:
        ValueError: If ``ema_power`` is ``None`` without another rate.
    """
    if ema_power is None and half_life is None and smoothing is None:
        raise ValueError('DEMA is an average of EMAs: give ema_power, half_life or smoothing.')
    return DEMA(ema_rule(ema_power, lag, multiplier, min_ema_multiplier, half_life, smoothing).beta)


def ouema_rule(
    ema_power: Optional[float] = DEFAULTS.ema_power,
    bias_power: Optional[float] = DEFAULTS.bias_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    half_life: Optional[float] = None,
    update_after: int = DEFAULTS.update_after,
) -> Union[OUEMA, EMA]:
    r"""Returns the EMA of de-biased weights, which without a bias correction is the EMA.

    Its :math:`\alpha_t = (1 + \max(t - \tau + \rho, 1))^{-\eta}` counts from the burn-in, as the reference's does.

    Args:
        bias_power (float, optional): eta, more than 0; ``None`` switches the correction off.
        update_after (int): tau, in steps.

    The other arguments, and the errors, are those of :func:`ema_rule`.
    """
    ema = ema_rule(ema_power, lag, multiplier, min_ema_multiplier, half_life)
    if bias_power is None:
        return ema
    _require_numbers(bias_power=bias_power)
    if bias_power == 0:
        raise ValueError('bias_power must be positive, but is 0, which would divide by zero in OUEMA.')
    return OUEMA(reference_decay(bias_power, lag, update_after), ema.beta)


def _require_numbers(**settings: object) -> None:
    """Checks settings under the names that users know them by."""
    for name, value in settings.items():
        require_number(name, value)
