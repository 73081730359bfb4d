# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The command that looks at what is installed."""

from __future__ import annotations

import sys

import click

__all__ = ['doctor']


@click.command()
def doctor() -> None:
    """Say what is installed, what can be computed on, and whether it all goes together (exit code 1 if not).

    Compares the versions with what the packages ask for, and imports them in another process.
    """
    from composer_bema.environment import broken_requirements, entry_points, import_all

    click.echo(_versions_table())
    for group, names in entry_points().items():
        click.echo(f'{group}: {", ".join(names) or "none"}')
    click.echo('Importing what is installed ...', err=True)
    imports = import_all()
    click.echo(f'devices: {", ".join(imports.devices) or "unknown"}')
    without = f'none, averages in host memory are slower ({imports.without_kernels})'
    click.echo(f'compiled kernels: {without if imports.without_kernels else "yes"}\n')
    problems = [*broken_requirements(), *imports.problems]
    for problem in problems:
        click.echo(f'- {problem}')
    if problems:
        sys.exit(1)
    click.echo('What is installed goes together.')


def _versions_table() -> str:
    import platform

    from tabulate import tabulate

    from composer_bema.environment import COMPONENTS, PACKAGE, requirement_of

    rows = [('Python', platform.python_version(), requirement_of('Python'))]
    rows += [(name, _version_in_words(name), requirement_of(name)) for name in (PACKAGE, *COMPONENTS)]
    return tabulate(rows, ['', 'installed', f'{PACKAGE} needs'], disable_numparse=True) + '\n'


def _version_in_words(distribution: str) -> str:
    from composer_bema.environment import installed_version

    try:
        return installed_version(distribution) or '-'
    except ValueError:
        return 'broken'
