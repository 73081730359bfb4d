# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a command says, and which of several processes says it."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator

import click

__all__ = ['clearing_up', 'is_first_process', 'say', 'show_log']


@contextlib.contextmanager
def clearing_up() -> Iterator[None]:
    """Let SIGTERM end what is done here as Ctrl-C does, so that nothing temporary is left behind."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(closing: str) -> None:
    """Print the closing words of a run, which the first of its processes has."""
    if closing:
        click.echo(closing)


def is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that a launcher has started."""
    return os.environ.get('RANK', '0') == '0'


def show_log(level: str | None, is_first_rank: bool = True) -> None:
    """Show our log from ``level`` on; unless told, what is about to be done, and of the rest warnings only."""
    logging.basicConfig(format='%(levelname)s: %(message)s')
    if level:
        logging.getLogger('composer_bema').setLevel(level.upper())
    elif is_first_rank:
        for room in ('evaluation', 'offline', 'training'):
            logging.getLogger(f'composer_bema.{room}').setLevel(logging.INFO)
