# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""An average as the command line and YAMLs name it: a rule, its settings, and the steps at which it is updated."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, get_args

from composer_bema.averaging.decay import ConstantDecay, PowerDecay, reference_decay
from composer_bema.averaging.rules import BEMA, DEMA, EMA, OUEMA, Rule, bema_rule, dema_rule, ema_rule, ouema_rule
from composer_bema.averaging.windows import DecayShape, SWAWindow, Window, require_count, swa_window_rule

__all__ = ['RULES', 'Schedule', 'Setting', 'settings_of']

# The schedules of alpha and beta: the paper's and TRL's, or those of the reference offline code (averaging/decay.py).
Schedule = Literal['paper', 'reference']
_SCHEDULED = (BEMA, DEMA, EMA, OUEMA)
# The settings of beta as a power, of which some are alpha's, too.
_OF_POWERS = ('ema_power', 'min_ema_multiplier', 'ema_update_after', 'lag', 'multiplier')


def training() -> Window:
    """Returns the weights of the checkpoint itself, beside which averages are judged."""
    return Window(1)


def lawa(window: int) -> Window:
    """Returns the mean of the last ``window`` checkpoints."""
    return Window(window)


def swa_window(horizon: int, update_freq: Optional[int], period: Optional[int] = None) -> SWAWindow:
    """Returns the mean of the checkpoints of the last ``horizon`` steps that make up whole periods.

    Args:
        horizon (int): In steps; a multiple of ``period``.
        update_freq (int, optional): The steps between two updates; None if they differ, which is an error.
        period (int, optional): In steps; a multiple of ``update_freq``. Default: ``horizon``.
    """
    if update_freq is None:
        raise ValueError('swa_window needs checkpoints that are evenly spaced: give an update_freq that picks such.')
    return swa_window_rule(horizon, update_freq, period)


def decay_merge(window: int, decay: DecayShape = 'linear') -> Window:
    """Returns the mean of the last ``window`` checkpoints that stands for a decay of the learning rate."""
    return Window(window, decay)


# The arguments of these are the settings that a rule takes, but for the steps, which are not set by its own.
RULES: dict[str, Callable[..., Rule]] = {
    'bema': bema_rule,
    'ema': ema_rule,
    'ouema': ouema_rule,
    'dema': dema_rule,
    'lawa': lawa,
    'swa_window': swa_window,
    'decay_merge': decay_merge,
    'training': training,
}
_STEPS = ('update_after', 'update_freq')
# Names of the weights in manifests, where they are not those of the rules in capitals.
_TITLES = {'training': 'training', 'swa_window': 'SWAWindow', 'decay_merge': 'DecayMerge'}


@dataclass(frozen=True)
class Setting:
    """One average that is to be made of checkpoints.

    Args:
        rule (str): A key of `RULES`.
        options (Mapping[str, Any]): The rule's settings; others are at their defaults.
        update_freq (int, optional): phi, in steps; None takes every checkpoint after the first.
        update_after (int): tau, the step of the checkpoint that it starts from. Default: ``0``.

    Raises:
        TypeError: If a number of steps is no whole number.
        ValueError: If there is no such rule, or it has no such setting, or needs another.
    """

    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)
    update_freq: Optional[int] = None
    update_after: int = 0

    def __post_init__(self) -> None:
        known = settings_of(self.rule)
        for name in self.options:
            if name not in known:
                raise ValueError(
                    f"The rule '{self.rule}' has no setting '{name}', but {', '.join(known) or 'none at all'}."
                )
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in self.options:
                raise ValueError(f"The rule '{self.rule}' needs the setting '{name}'.")
        if self.update_freq is not None:
            require_count('update_freq', self.update_freq)
        _require_step('update_after', self.update_after)

    @property
    def title(self) -> str:
        """What the weights are called, as a class of the average would be, or ``'training'``."""
        if 'bias_power' in self.options and self.options['bias_power'] is None:
            return 'EMA'
        return _TITLES.get(self.rule, self.rule.upper())

    @property
    def given(self) -> dict[str, Any]:
        """Its settings that are not at their defaults."""
        steps = {'update_freq': self.update_freq, 'update_after': self.update_after or None}
        return {**self.options, **{name: value for name, value in steps.items() if value is not None}}

    @property
    def effective(self) -> dict[str, Any]:
        """The settings of its rule that have an effect, with those at their defaults."""
        values = _values(self.rule, self.options)
        # What None stands for where it switches nothing off.
        others = {'period': values.get('horizon'), 'ema_update_after': self.update_after}
        values |= {name: other for name, other in others.items() if name in values and values[name] is None}
        idle = {*_idle(self.rule, self.options)}
        if values.get('schedule') == 'paper':
            idle.add('ema_update_after')
        return {name: value for name, value in values.items() if name not in idle}

    def __str__(self) -> str:
        return ' '.join([self.rule, *(f'{name}={value}' for name, value in self.given.items())])

    def build(self, update_freq: Optional[int]) -> Rule:
        """Returns the rule.

        Args:
            update_freq (int, optional): The steps between two updates; None if they differ.

        Raises:
            TypeError: If a setting is of another type.
            ValueError: If one is out of its range, or has no effect beside another.
        """
        factory = RULES[self.rule]
        steps = {'update_after': self.update_after, 'update_freq': update_freq}
        wanted = {name: value for name, value in steps.items() if name in inspect.signature(factory).parameters}
        options = dict(self.options)
        schedule = options.pop('schedule', 'paper')
        ema_update_after = options.pop('ema_update_after', None)
        self._refuse_idle()
        rule = factory(**wanted, **options)
        if schedule not in get_args(Schedule):
            raise ValueError(f'schedule must be one of {", ".join(get_args(Schedule))}, but is {schedule!r}.')
        if schedule == 'reference':
            rule = _with_reference_schedule(rule, self.update_after, ema_update_after)
        elif ema_update_after is not None:
            raise ValueError("ema_update_after belongs to schedule='reference'.")
        return rule

    def _refuse_idle(self) -> None:
        for name, other in _idle(self.rule, self.options).items():
            if name in self.options:
                raise ValueError(f'{name} has no effect beside {other}={self.options[other]}: leave out one of them.')


def settings_of(rule: str) -> dict[str, inspect.Parameter]:
    """Returns the settings that a rule takes, by name.

    Raises:
        ValueError: If there is no such rule.
    """
    # One that is no text may have no hash to be looked up by.
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f'There is no rule {rule!r}, but {", ".join(RULES)}.')
    parameters = {n: p for n, p in inspect.signature(RULES[rule]).parameters.items() if n not in _STEPS}
    if 'ema_power' in parameters:
        parameters |= inspect.signature(_schedule_settings).parameters
    return parameters


def _values(rule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name, parameter.default) for name, parameter in settings_of(rule).items()}


def _idle(rule: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that have no effect, each with the one that has taken it away."""
    values = _values(rule, options)
    rate = next((name for name in ('half_life', 'smoothing') if values.get(name) is not None), 'ema_power')
    # Without schedules there is nothing to take away, and with beta a power all of them serve.
    if 'ema_power' not in values or (rate == 'ema_power' and values[rate] is not None):
        return {}
    idle = [name for name in _OF_POWERS if name != rate]
    if values.get('bias_power') is not None:
        # alpha is a power, but OUEMA's and the reference's have no multiplier.
        idle.remove('lag')
        if rule == 'bema' and values['schedule'] == 'paper':
            idle.remove('multiplier')
    return dict.fromkeys(idle, rate)


def _schedule_settings(schedule: Schedule = 'paper', ema_update_after: Optional[int] = None) -> None:
    """Has the settings of all rules whose schedules are powers.

    Args:
        schedule (str): ``'reference'`` takes the schedules of the reference offline code.
        ema_update_after (int, optional): With these, the step from which beta counts. Default: tau.
    """


def _require_step(name: str, value: object) -> None:
    """Checks that a setting is the number of a step, of which 0 is that before the first."""
    if value != 0:
        require_count(name, value)


def _with_reference_schedule(rule: Rule, update_after: int, ema_update_after: Optional[int]) -> Rule:
    assert isinstance(rule, _SCHEDULED)
    since = update_after if ema_update_after is None else ema_update_after
    _require_step('ema_update_after', since)
    changes = {}
    if isinstance(rule.beta, PowerDecay):
        beta = rule.beta
        changes['beta'] = reference_decay(beta.power, beta.lag, since, beta.multiplier, beta.floor)
    elif rule.beta != ConstantDecay(1.0):
        raise ValueError("schedule='reference' is one of ema_power: leave out half_life and smoothing.")
    if isinstance(rule, BEMA):
        assert isinstance(rule.alpha, PowerDecay)
        changes['alpha'] = reference_decay(rule.alpha.power, rule.alpha.lag, update_after)
    return dataclasses.replace(rule, **changes)
