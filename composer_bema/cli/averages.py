# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The settings of averages, as options of commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from composer_bema.offline.settings import Setting

__all__ = ['RULE_HELP', 'average_options', 'build_setting']

RULE_HELP = 'bema, ema, ouema, dema, lawa, swa_window, decay_merge or training'


class NumberOrNone(click.ParamType):
    """A number, or ``none``, which switches something off."""

    name = 'number|none'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Keep ``none`` as a text: for click a missing value is None."""
        if str(value).lower() == 'none':
            return 'none'
        return click.FLOAT.convert(value, param, ctx)


def average_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings of averages, and the choice of checkpoints."""
    number, steps = NumberOrNone(), click.IntRange(min=0)
    options = [
        click.option('--update-freq', type=steps, help='Steps between updates.  [default: every checkpoint]'),
        click.option('--update-after', type=steps, default=0, show_default=True, help='The step to start from.'),
        click.option('--at', type=steps, multiple=True, help='A step to average at; repeatable.  [default: the last]'),
        click.option('--ema-power', type=number, help="kappa; 'none' keeps no history.  [default: 0.5]"),
        click.option('--bias-power', type=number, help="eta; 'none' corrects nothing.  [default: 0.2]"),
        click.option('--lag', type=float, help='rho, the virtual starting age in steps.  [default: 10]'),
        click.option('--multiplier', type=float, help='gamma, the pace of the schedules.  [default: 1]'),
        click.option('--min-ema-multiplier', type=float, help='The floor of beta.  [default: 0]'),
        click.option('--half-life', type=float, help='In steps; a constant rate in place of --ema-power.'),
        click.option('--smoothing', type=float, help='What an EMA keeps at an update, in place of --ema-power.'),
        click.option('--schedule', help="'paper', or 'reference': that of the paper's offline code.  [default: paper]"),
        click.option('--ema-update-after', type=steps, help='With the latter, the step from which beta counts.'),
        click.option('--window', type=int, help='Of lawa and decay_merge: the number of checkpoints.'),
        click.option('--decay', help="Of decay_merge: 'linear', '1-sqrt' or 'cosine'.  [default: linear]"),
        click.option('--horizon', type=int, help='Of swa_window: the steps that are averaged.'),
        click.option('--period', type=int, help='Of swa_window: the steps of a period.  [default: the horizon]'),
        click.option('--initial-model', help='The weights before the first step: a folder, file or hub name.'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def build_setting(rule: str, options: dict[str, Any], rules: Sequence[str] = ()) -> Setting:
    """Make a setting of a rule of the options that were given; of several ``rules`` each takes those that it has."""
    from composer_bema.offline.settings import Setting, settings_of

    steps = {name: options[name] for name in ('update_freq', 'update_after')}
    given = {n: None if v == 'none' else v for n, v in options.items() if v is not None and n not in steps}
    others = {name for other in rules for name in settings_of(other)}
    taken = {n: v for n, v in given.items() if n in settings_of(rule) or n not in others}
    return Setting(rule, taken, **steps)
