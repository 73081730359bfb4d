# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How long it takes until the package is imported and the command line says what it can do.

    python benchmarks/startup.py

It prints the table of docs/performance.md: medians over processes, the start of the interpreter included.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import click
from measuring import Row, markdown, save, seconds

# As the console script does it.
CLI = "import sys; from composer_bema.cli import main; main(sys.argv[1:], 'composer-bema')"
COMMANDS: dict[str, list[str]] = {
    'python -c pass': ['pass'],
    'import composer_bema': ['import composer_bema'],
    'composer-bema --help': [CLI, '--help'],
    'composer-bema train --help': [CLI, 'train', '--help'],
    'composer-bema evaluate --help': [CLI, 'evaluate', '--help'],
    'import torch': ['import torch'],
}

LISTS_MODULES = 'import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); '


def run(code: str, *arguments: str) -> str:
    """Runs code in a fresh interpreter and returns what it writes to stderr."""
    command = [sys.executable, '-c', code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr


def measure(repeats: int) -> dict[str, Row]:
    """The seconds of every command by repeat, one command after the other, and whether it imports torch."""
    results: dict[str, Row] = {}
    for name, (code, *arguments) in COMMANDS.items():
        results[name] = {'seconds': [], 'torch': 'torch' in run(LISTS_MODULES + code, *arguments).split()}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            results[name]['seconds'].append(seconds(lambda arguments=arguments: run(*arguments)))
    return results


def table(results: dict[str, Row]) -> str:
    """A row a command: its median and the time above the bare interpreter's."""
    medians = {name: statistics.median(row['seconds']) for name, row in results.items()}
    bare = medians['python -c pass']
    return markdown(
        [
            {
                '': f'`{name}`',
                'seconds': medians[name],
                'above the interpreter': medians[name] - bare,
                'imports torch': 'yes' if row['torch'] else 'no',
            }
            for name, row in results.items()
        ],
        digits=3,
    )


@click.command(context_settings={'show_default': True})
@click.option('--repeats', type=click.IntRange(1), default=11)
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='runs/benchmarks')
def main(repeats: int, out: Path) -> None:
    """Measure how long processes take to start, and print a table."""
    results = measure(repeats)
    title = f'Medians of {repeats} processes'
    save(out, 'startup', f'{title}\n\n{table(results)}', {'title': title, 'rows': results})


if __name__ == '__main__':
    main()
