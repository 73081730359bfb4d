# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The ``composer-bema`` command; its commands import what they need when they run, so that help comes at once."""

from __future__ import annotations

from typing import Any

import click

from composer_bema.cli.doctor import doctor
from composer_bema.cli.evaluation import evaluate
from composer_bema.cli.flops import flops
from composer_bema.cli.offline import export, stabilize, sweep, weights
from composer_bema.cli.training import convert, cooldown, report, train
from composer_bema.version import __version__

__all__ = ['main']


class WrongInput(click.ClickException):
    """A setting or file is wrong."""

    exit_code = 2


class OneSentence(click.Group):
    """A group whose commands report a wrong setting or file as one sentence (exit code 2) instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ``--traceback`` lets its errors through as they are."""
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            if ctx.params['traceback']:
                raise
            sentence = ' '.join(str(error).split()) or type(error).__name__
            raise WrongInput(sentence) from error


@click.group(cls=OneSentence, context_settings={'help_option_names': ['-h', '--help']})
@click.option('--traceback', is_flag=True, help='Show where an error was raised.')
@click.version_option(__version__)
def main(traceback: bool) -> None:
    """Weight averaging without the lag (BEMA) for MosaicML Composer."""
    del traceback  # read by OneSentence


for _command in (train, cooldown, report, convert, export, stabilize, sweep, weights, evaluate, flops, doctor):
    main.add_command(_command)
