# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The averages for hand-written training loops, with torch alone.

Example:
    >>> from composer_bema import functional as cf
    >>> state = cf.init_bema(model, update_freq=10)
    >>> for batch in loader:
    ...     train_step(model, batch)
    ...     cf.compute_bema(model, state)
    >>> with state.applied_to(model):
    ...     evaluate(model)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch

from composer_bema.averaging.defaults import DEFAULTS, default_update_freq
from composer_bema.averaging.rules import Rule, bema_rule, dema_rule, ema_rule, ouema_rule
from composer_bema.averaging.state import AverageState, NonFinite
from composer_bema.averaging.windows import Window, swa_window_rule

__all__ = [
    'LoopState',
    'compute_average',
    'compute_bema',
    'compute_ema',
    'init_bema',
    'init_dema',
    'init_ema',
    'init_lawa',
    'init_ouema',
    'init_swa_window',
]

Steps = Union[int, str]


class LoopState(AverageState):
    """An :class:`.AverageState` that counts the optimizer steps of a loop and knows when an update is due.

    Args:
        rule (Rule): The average.
        model (torch.nn.Module): The model before its first step.
        update_freq (int | str): phi, the steps between two updates, counted from ``update_after``; ``400`` or
            ``'400ba'``.
        update_after (int | str): tau, the step at which theta_0 and the EMA are taken. ``0`` takes the weights before
            the first step.

    The other arguments are those of :class:`.AverageState`.

    Attributes:
        step (int): The optimizer steps counted so far.
    """

    def __init__(
        self,
        rule: Rule,
        model: torch.nn.Module,
        *,
        update_freq: Steps,
        update_after: Steps,
        average_buffers: bool,
        nonfinite: NonFinite,
        device: Optional[Union[torch.device, str]],
        snapshot_folder: Optional[str] = None,
    ) -> None:
        super().__init__(
            rule,
            average_buffers=average_buffers,
            nonfinite=nonfinite,
            device=device,
            snapshot_folder=snapshot_folder,
        )
        self.update_freq = _steps('update_freq', update_freq, at_least=1)
        self.update_after = _steps('update_after', update_after, at_least=0)
        self.step = 0
        self._last_update = 0
        self._start_if_reached(model)

    def count_step(self, model: torch.nn.Module) -> bool:
        """Counts one optimizer step, takes theta_0 at tau, updates when due, and returns whether it updated."""
        self._require_training_weights('compute_average', model)
        self.step += 1
        if not self.started:
            self._start_if_reached(model)
            return False
        if (self.step - self.update_after) % self.update_freq:
            return False
        if self.update(model, self.step, elapsed=self.step - self._last_update) is None:
            return False
        self._last_update = self.step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), 'step': self.step, 'last_update': self._last_update}

    def load_state_dict(self, state: Mapping[str, Any], model: torch.nn.Module) -> None:
        if 'step' not in state:
            raise ValueError('The saved state counts no steps: it was not saved by what init_bema and its like return.')
        step, last_update = state['step'], state['last_update']
        super().load_state_dict(state, model)
        self.step, self._last_update = step, last_update

    def _start_if_reached(self, model: torch.nn.Module) -> None:
        if self.step >= self.update_after:
            self.start(model)
            self._last_update = self.step


def init_bema(
    model: torch.nn.Module,
    *,
    update_freq: Optional[Steps] = None,
    update_after: Steps = DEFAULTS.update_after,
    ema_power: Optional[float] = DEFAULTS.ema_power,
    bias_power: Optional[float] = DEFAULTS.bias_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    half_life: Optional[Union[float, str]] = None,
    average_buffers: bool = True,
    nonfinite: NonFinite = 'raise',
    device: Optional[Union[torch.device, str]] = None,
) -> LoopState:
    r"""Starts the bias-corrected EMA of a model's weights (arXiv 2508.00180).

    .. math::
        EMA_t &= (1 - \beta_t) EMA_{t - \phi} + \beta_t \theta_t, & \beta_t &= \max((\rho + \gamma t)^{-\kappa}, m) \\
        BEMA_t &= EMA_t + \alpha_t (\theta_t - \theta_0), & \alpha_t &= (\rho + \gamma t)^{-\eta}

    where t counts the calls of :func:`compute_bema`, and neither alpha nor beta exceeds 1.

    Args:
        model (torch.nn.Module): The model before its first step.
        update_freq (int | str, optional): phi, the steps from one update to the next; ``10`` or ``'10ba'``. Default:
            ``400``, or ``1`` with ``half_life``.
        update_after (int | str): tau, the step at which theta_0 and the EMA are taken. Default: ``0``, the weights
            before the first step.
        ema_power (float, optional): kappa, at least 0. ``0`` keeps no history, and ``None`` switches the EMA off, so
            that only the correction is added to the newest weights.
        bias_power (float, optional): eta, at least 0. ``0`` corrects fully for ever, a large value fades the
            correction, and ``None`` switches it off.
        lag (float): rho, the virtual starting age in steps.
        multiplier (float): gamma, the pace at which both schedules age.
        min_ema_multiplier (float): m, the floor of beta, in [0, 1].
        half_life (float | str, optional): In steps, ``10`` or ``'10ba'``. Replaces ``ema_power`` by the constant
            :math:`\beta = 1 - 2^{-\phi / \text{half\_life}}`.
        average_buffers (bool): Whether floating-point module buffers are averaged too, or copied.
        nonfinite (str): ``'raise'``, ``'skip'`` or ``'ignore'`` updates from weights that hold a NaN or an infinity.
        device (torch.device | str, optional): Where the average is kept; ``'cpu'`` for host memory. Default: beside the
            parameters. In host memory, of a model on a GPU, updates are computed by a thread of their own, from one
            more copy of the weights; what uses the state waits for it.

    Returns:
        LoopState: The state to hand to :func:`compute_bema`. It keeps three fp32 buffers a parameter, and one without a
        correction.

    Raises:
        ValueError: If a setting is out of its range.
    """
    return LoopState(
        bema_rule(ema_power, bias_power, lag, multiplier, min_ema_multiplier, _half_life(half_life)),
        model,
        update_freq=default_update_freq(half_life) if update_freq is None else update_freq,
        update_after=update_after,
        average_buffers=average_buffers,
        nonfinite=nonfinite,
        device=device,
    )


def compute_bema(model: torch.nn.Module, state: LoopState) -> bool:
    """Follows one optimizer step. Call it once after every ``optimizer.step()``.

    Args:
        model (torch.nn.Module): The model, holding its training weights.
        state (LoopState): The state that :func:`init_bema` returned; changed in place.

    Returns:
        bool: Whether the average was updated.

    Raises:
        FloatingPointError: If an update is due, a weight is not finite and ``nonfinite='raise'``.
        RuntimeError: If the model holds the average.
    """
    return state.count_step(model)


def init_ema(
    model: torch.nn.Module,
    *,
    half_life: Optional[Union[float, str]] = None,
    smoothing: Optional[float] = None,
    update_freq: Optional[Steps] = None,
    update_after: Steps = DEFAULTS.update_after,
    ema_power: Optional[float] = DEFAULTS.ema_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    average_buffers: bool = True,
    nonfinite: NonFinite = 'raise',
    device: Optional[Union[torch.device, str]] = None,
) -> LoopState:
    """Starts the plain EMA of a model's weights: BEMA without its correction, or with a constant rate.

    Args:
        half_life (float | str, optional): In steps; as in :func:`init_bema`.
        smoothing (float, optional): Replaces ``ema_power`` by the constant beta = 1 - smoothing at every update, in
            [0, 1). ``update_freq`` then defaults to ``1``.

    The other arguments, and the errors, are those of :func:`init_bema`.

    Returns:
        LoopState: The state to hand to :func:`compute_ema`. It keeps one fp32 buffer a parameter.
    """
    return LoopState(
        ema_rule(ema_power, lag, multiplier, min_ema_multiplier, _half_life(half_life), smoothing),
        model,
        update_freq=default_update_freq(half_life, smoothing) if update_freq is None else update_freq,
        update_after=update_after,
        average_buffers=average_buffers,
        nonfinite=nonfinite,
        device=device,
    )


def compute_ema(model: torch.nn.Module, state: LoopState) -> bool:
    """Follows one optimizer step, as :func:`compute_bema` does."""
    return state.count_step(model)


def init_dema(
    model: torch.nn.Module,
    *,
    half_life: Optional[Union[float, str]] = None,
    smoothing: Optional[float] = None,
    update_freq: Optional[Steps] = None,
    update_after: Steps = DEFAULTS.update_after,
    ema_power: Optional[float] = DEFAULTS.ema_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    average_buffers: bool = True,
    nonfinite: NonFinite = 'raise',
    device: Optional[Union[torch.device, str]] = None,
) -> LoopState:
    """Starts the double EMA of a model's weights, 2 EMA - EMA(EMA), which does not lag on a straight line.

    The arguments and errors are those of :func:`init_ema`, but it is nothing without an EMA.

    Returns:
        LoopState: The state to hand to :func:`compute_average`. It keeps three fp32 buffers a parameter.
    """
    return LoopState(
        dema_rule(ema_power, lag, multiplier, min_ema_multiplier, _half_life(half_life), smoothing),
        model,
        update_freq=default_update_freq(half_life, smoothing) if update_freq is None else update_freq,
        update_after=update_after,
        average_buffers=average_buffers,
        nonfinite=nonfinite,
        device=device,
    )


def init_ouema(
    model: torch.nn.Module,
    *,
    update_freq: Optional[Steps] = None,
    update_after: Steps = DEFAULTS.update_after,
    ema_power: Optional[float] = DEFAULTS.ema_power,
    bias_power: Optional[float] = DEFAULTS.bias_power,
    lag: float = DEFAULTS.lag,
    multiplier: float = DEFAULTS.multiplier,
    min_ema_multiplier: float = DEFAULTS.min_ema_multiplier,
    half_life: Optional[Union[float, str]] = None,
    average_buffers: bool = True,
    nonfinite: NonFinite = 'raise',
    device: Optional[Union[torch.device, str]] = None,
) -> LoopState:
    r"""Starts the EMA of a model's de-biased weights, :math:`(\theta_t - \alpha_t \theta_0) / (1 - \alpha_t)`.

    Args:
        bias_power (float, optional): eta in :math:`\alpha_t = (1 + \max(t - \tau + \rho, 1))^{-\eta}`, more than 0;
            ``None`` switches the correction off.

    The other arguments, and the errors, are those of :func:`init_bema`.

    Returns:
        LoopState: The state to hand to :func:`compute_average`. It keeps two fp32 buffers a parameter.
    """
    tau = _steps('update_after', update_after, at_least=0)
    return LoopState(
        ouema_rule(ema_power, bias_power, lag, multiplier, min_ema_multiplier, _half_life(half_life), tau),
        model,
        update_freq=default_update_freq(half_life) if update_freq is None else update_freq,
        update_after=tau,
        average_buffers=average_buffers,
        nonfinite=nonfinite,
        device=device,
    )


def init_lawa(
    model: torch.nn.Module,
    *,
    update_freq: Steps = DEFAULTS.lawa_update_freq,
    window: int = DEFAULTS.lawa_window,
    update_after: Steps = DEFAULTS.update_after,
    snapshot_folder: Optional[str] = None,
    average_buffers: bool = True,
    nonfinite: NonFinite = 'raise',
    device: Optional[Union[torch.device, str]] = 'cpu',
) -> LoopState:
    """Starts the mean of a model's latest weights (arXiv 2209.14981, 2306.03241).

    Args:
        update_freq (int | str): phi, the steps from one snapshot to the next.
        window (int): The snapshots that are averaged, at least 1; of as many as there are before the window is full.
        snapshot_folder (str, optional): A folder on a disk to keep the snapshots in instead of memory. Its files are
            gone with the state.
        device (torch.device | str, optional): Where snapshots and average are kept. Default: ``'cpu'``.

    The other arguments, and the errors, are those of :func:`init_bema`.

    Returns:
        LoopState: The state to hand to :func:`compute_average`. It keeps ``window`` copies of the parameters, and their
        mean in fp32.

    Example:
        >>> state = cf.init_lawa(model, update_freq=1000, window=10)
        >>> if cf.compute_average(model, state):  # to train on from the average
        ...     state.copy_to(model)
    """
    return LoopState(
        Window(window),
        model,
        update_freq=update_freq,
        update_after=update_after,
        average_buffers=average_buffers,
        nonfinite=nonfinite,
        device=device,
        snapshot_folder=snapshot_folder,
    )


def init_swa_window(
    model: torch.nn.Module,
    *,
    update_freq: Steps = DEFAULTS.swa_update_freq,
    horizon: Steps = DEFAULTS.swa_horizon,
    period: Optional[Steps] = None,
    update_after: Steps = DEFAULTS.update_after,
    average_buffers: bool = True,
    nonfinite: NonFinite = 'raise',
    device: Optional[Union[torch.device, str]] = None,
) -> LoopState:
    """Starts the mean of a model's weights over whole periods of training (arXiv 2405.18392).

    Args:
        update_freq (int | str): phi, the steps from one update to the next.
        horizon (int | str): The steps that are averaged, a multiple of ``period``.
        period (int | str, optional): The steps after which the running mean starts again, a multiple of
            ``update_freq``. Default: ``horizon``.

    The other arguments, and the errors, are those of :func:`init_bema`.

    Returns:
        LoopState: The state to hand to :func:`compute_average`. It keeps two fp32 buffers a parameter, and one a
        period.
    """
    return LoopState(
        swa_window_rule(
            _steps('horizon', horizon, at_least=1),
            _steps('update_freq', update_freq, at_least=1),
            None if period is None else _steps('period', period, at_least=1),
        ),
        model,
        update_freq=update_freq,
        update_after=update_after,
        average_buffers=average_buffers,
        nonfinite=nonfinite,
        device=device,
    )


def compute_average(model: torch.nn.Module, state: LoopState) -> bool:
    """Follows one optimizer step with any of the averages, as :func:`compute_bema` does."""
    return state.count_step(model)


def _steps(name: str, value: Steps, at_least: int) -> int:
    """Reads a number of steps given as an int or as Composer writes batches, ``'400ba'``."""
    match = re.fullmatch(r'([0-9]+)(ba)?', str(value))
    if match is None or int(match[1]) < at_least:
        raise ValueError(
            f"{name} must be a number of steps of at least {at_least}, such as 400 or '400ba', but is {value!r}.",
        )
    return int(match[1])


def _half_life(value: Optional[Union[float, str]]) -> Optional[float]:
    """Reads a half-life given as a number of steps or as Composer writes batches."""
    return float(_steps('half_life', value, at_least=1)) if isinstance(value, str) else value
