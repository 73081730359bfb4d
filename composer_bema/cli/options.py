# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Options that reach a command together as one record, and the refusal of those that would have no effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from click.core import ParameterSource

__all__ = ['NamedFile', 'grouped', 'refuse']

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class NamedFile(click.ParamType):
    """A name and a file, written as ``name=file``."""

    name = 'name=file'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first sign of equality."""
        name, _, file = str(value).partition('=')
        if not name or not file:
            self.fail(f'{value!r} is not of the form NAME=FILE.', param, ctx)
        return name, file


def grouped(name: str, record: Any, options: Sequence[Decorator]) -> Decorator:
    """Give a command options that reach it as one argument.

    Args:
        name: What the argument is called.
        record: Its type, a NamedTuple whose fields are called as the options.
        options: The options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathered(**values: Any) -> None:
            fields = {field: values.pop(field) for field in record._fields}
            command(**{name: record(**fields)}, **values)

        decorated: Callable[..., None] = gathered
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def refuse(names: Iterable[str], why: str) -> None:
    """Check that none of the options was given to the current command, whatever its value."""
    context = click.get_current_context()
    refused = set(names)
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or '')
        if parameter.name in refused and source is ParameterSource.COMMANDLINE:
            raise click.UsageError(f'{parameter.opts[0]} {why}')
