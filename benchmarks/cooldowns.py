# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""One long run at a constant learning rate, three branches with a cooldown, and averages beside them.

    python benchmarks/cooldowns.py
    python benchmarks/cooldowns.py --steps 40

Run it from the repository's root; about ten minutes on two cores, and one with the second command. It runs the commands
of docs/cooldowns.md, which it prints, and writes the tables of that page and its pictures to runs/cooldowns.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Read when torch is loaded.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import click
from tabulate import tabulate

from composer_bema.cli import main as composer_bema
from composer_bema.plots import plot_curves
from composer_bema.training.outputs import METRICS_FILE, evaluation_curves, read_metrics

RUN = Path('runs/constant_rate')
MERGES = Path('runs/constant_rate-merges')
OUT = Path('runs/cooldowns')

STEPS = 1000
# Where the branches start, as parts of the run; each cooldown takes a fifth of its branch.
STARTS = (0.4, 0.6, 0.8)
FRACTION = 0.2
# The steps from one checkpoint to the next, as a part of the run.
INTERVAL = 1 / 40

SHAPES = ('linear', '1-sqrt', 'cosine')
AVERAGES = {'bema': 'BEMA', 'lawa': 'LAWA', 'swa_window': 'SWAWindow'}

Curve = list[tuple[float, float]]


def branches(steps: int) -> dict[int, int]:
    """The steps at which the branches end, by those at which they start."""
    starts = [round(start * steps) for start in STARTS]
    return {start: round(start / (1 - FRACTION)) for start in starts}


def commands(steps: int) -> list[list[str]]:
    """The arguments of the commands of the page."""
    yaml, sweep = 'yamls/constant_rate.yaml', 'yamls/sweeps/constant_rate.yaml'
    shorter, fewer = ([], []) if steps == STEPS else shortened(steps)
    return [
        ['train', yaml, *shorter],
        *(['cooldown', str(RUN), '--at', str(start)] for start in branches(steps)),
        ['sweep', f'{RUN}/checkpoints', '--config', sweep, '--out', str(MERGES), *fewer],
    ]


def shortened(steps: int) -> tuple[list[str], list[str]]:
    """What a shorter run overrides in the two YAMLs, with less text held out."""
    part = {
        'max_duration': 1,
        'eval_interval': 1 / 4,
        'save_interval': INTERVAL,
        'scheduler.t_warmup': 0.03,
        'algorithms.bema.update_freq': 1 / 200,
        'algorithms.bema.update_after': 0.1,
        'algorithms.bema.half_life': 0.05,
        'algorithms.lawa.update_freq': INTERVAL,
        'algorithms.swa_window.update_freq': 1 / 200,
        'algorithms.swa_window.horizon': 0.1,
    }
    times = [f'{key}={max(1, round(share * steps))}ba' for key, share in part.items()]
    ends = ', '.join(map(str, branches(steps).values()))
    return (
        [*times, 'variables.held_out.train_fraction=0.98'],
        [f'at=[{ends}]', 'evaluate.eval_loader.0.dataset.train_fraction=0.98'],
    )


def evaluations(folder: Path) -> dict[str, dict[int, float]]:
    """Losses by evaluator and step."""
    return {label: dict(curve) for label, curve in evaluation_curves(read_metrics(folder / METRICS_FILE)).items()}


def merges() -> dict[tuple[int, int, str], float]:
    """Losses of merges by their step, window and decay."""
    with (MERGES / 'results.csv').open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return {(int(row['step']), int(row['window']), row['decay']): float(row['held_out']) for row in rows}


def rows_at_the_ends(steps: int) -> list[dict[str, Any]]:
    """What the run, each branch, the merges and the averages have come to where a branch ends."""
    run, merged = evaluations(RUN), merges()
    rows = []
    for start, end in branches(steps).items():
        constant = run['training'][end]
        cooled = evaluations(branch_folder(start, end))['training'][end]
        window = round((end - start) / (INTERVAL * steps)) + 1
        losses = {f'merge, {shape}': merged[end, window, shape] for shape in SHAPES}
        losses |= {title: run[label][end] for label, title in AVERAGES.items()}
        # How much of the cooldown's gain each has without a step at another rate.
        shares = {name: (constant - loss) / (constant - cooled) for name, loss in losses.items()}
        rows.append({'start': start, 'end': end, 'constant': constant, 'cooldown': cooled, **losses, 'shares': shares})
    return rows


def branch_folder(start: int, end: int) -> Path:
    """The folder of the branch from one step to another."""
    return RUN.with_name(f'{RUN.name}-cooldown-{start}ba-{end}ba-1-sqrt')


def curves_over(clock: str, steps: int) -> dict[str, Curve]:
    """The losses of the run, its averages and its branches over tokens or FLOPs."""
    curves = {}
    run, clocks = evaluations(RUN), clock_of(read_metrics(RUN / METRICS_FILE), clock)
    # The beginning would leave no room for what differs.
    late = {
        label: {step: loss for step, loss in losses.items() if step >= 0.3 * steps} for label, losses in run.items()
    }
    for label, title in {'training': 'constant rate', **AVERAGES}.items():
        curves[title] = [(clocks[step], loss) for step, loss in late[label].items()]
    for start, end in branches(steps).items():
        folder = branch_folder(start, end)
        clocks = {**clocks, **clock_of(read_metrics(folder / METRICS_FILE), clock)}
        losses = {start: run['training'].get(start), **evaluations(folder)['training']}
        points = [(clocks[step], loss) for step, loss in losses.items() if loss is not None]
        curves[f'cooldown from step {start}'] = points
    return curves


def clock_of(records: Iterable[Mapping[str, Any]], clock: str) -> dict[int, float]:
    """What a clock has shown, by the step."""
    return {record['batch']: record[clock] for record in records if clock in record}


@click.command(context_settings={'help_option_names': ['-h', '--help']})
@click.option('--steps', default=STEPS, show_default=True, help='Of the long run; a multiple of 40.')
@click.option('--dry-run', is_flag=True, help='Print the commands, and run none.')
def main(steps: int, dry_run: bool) -> None:
    """Train the long run and its branches, merge its checkpoints, and write tables and pictures."""
    if steps < 40 or steps % 40:
        raise click.UsageError(f'--steps must be a multiple of 40, and is {steps}.')
    if not dry_run:
        # A sweep writes over nothing.
        shutil.rmtree(MERGES, ignore_errors=True)
    for arguments in commands(steps):
        click.echo(f'composer-bema {" ".join(arguments)}')
        if not dry_run:
            composer_bema.main(arguments, standalone_mode=False)
    if dry_run:
        return
    rows = rows_at_the_ends(steps)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / 'results.json').write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
    plot_curves(curves_over('token', steps), OUT / 'tokens.png', 'tokens', 'held-out loss (nats per token)')
    plot_curves(
        curves_over('flops/total', steps), OUT / 'flops.png', 'FLOPs of training', 'held-out loss (nats per token)'
    )
    table = [{name: value for name, value in row.items() if name != 'shares'} for row in rows]
    click.echo('\n' + tabulate(table, headers='keys', tablefmt='github', floatfmt='.4f') + '\n')
    shares = [{'start': row['start'], 'end': row['end'], **row['shares']} for row in rows]
    click.echo("The part of the cooldown's gain over the constant rate:\n")
    click.echo(tabulate(shares, headers='keys', tablefmt='github', floatfmt='.2f') + '\n')
    click.echo(f'All of it: {OUT}')


if __name__ == '__main__':
    main()
