# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the studies share: how settings are chosen, what is said of several seeds, and how steps saved are counted.

A record is what one seed had come to at one step: the keys that say where it is from, and a value for each method.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

METHODS = ('training', 'ema', 'bema')
TITLES = {'training': 'training weights', 'ema': 'EMA', 'bema': 'BEMA'}

Record = dict[str, Any]


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean; not a number for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_record(records: Sequence[Record], columns: Iterable[str]) -> Record:
    """The mean of each column over seeds."""
    return {column: statistics.fmean(record[column] for record in records) for column in columns}


def curve_over_seeds(records: Iterable[Record], column: str) -> list[tuple[int, float, float]]:
    """The step, the mean and the standard error between seeds, step by step."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        by_step.setdefault(record['step'], []).append(record[column])
    return [(step, statistics.fmean(values), standard_error(values)) for step, values in sorted(by_step.items())]


def select(records: Iterable[Record], **keys: Any) -> list[Record]:
    """The records with these values under these keys."""
    return [record for record in records if all(record[key] == value for key, value in keys.items())]


def best_settings(rows: Iterable[Record], step: int, loss: str) -> dict[str, Record]:
    """The settings of the lowest loss at a step, by the rule.

    Args:
        rows: Lines of a sweep's results.
        step: The step.
        loss: The name of the loss in them.
    """
    best: dict[str, Record] = {}
    for row in select(rows, step=step):
        if row['rule'] not in best or row[loss] < best[row['rule']][loss]:
            best[row['rule']] = row
    return {rule: {n: v for n, v in row.items() if n not in ('step', loss)} for rule, row in best.items()}


def steps_to_best_ema(records: Sequence[Record]) -> dict[str, int | None]:
    """The first step at which each method is at or below the lowest loss of one seed's EMA; None if it never is."""
    target = min(record['ema'] for record in records)
    return {
        method: min((record['step'] for record in records if record[method] <= target), default=None)
        for method in METHODS
    }


def steps_saved(records: Sequence[Record]) -> int | None:
    """How many steps before one seed's EMA its BEMA reaches the EMA's lowest loss; None if it never does."""
    steps = steps_to_best_ema(records)
    ema, bema = steps['ema'], steps['bema']
    return None if ema is None or bema is None else ema - bema


def describe(setting: Mapping[str, Any]) -> str:
    """A setting as a person reads it."""
    options = [f'{name} {value:g}' for name, value in setting.items() if name != 'rule']
    return ', '.join([TITLES[setting['rule']], *options])


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """A Markdown table of rows; floats have four digits, and None is a dash."""
    columns = columns or list(rows[0])
    cells = [[_as_text(row[column]) for column in columns] for row in rows]
    return tabulate(cells, columns, tablefmt='github', disable_numparse=True, stralign='right') + '\n'


def table_of_seeds(records: Sequence[Record], columns: Sequence[str]) -> str:
    """Every seed, then the mean and the standard error between seeds."""
    errors = {column: standard_error([record[column] for record in records]) for column in columns}
    mean = mean_record(records, columns)
    return markdown([*records, {'seed': 'mean', **mean}, {'seed': 'standard error', **errors}], ['seed', *columns])


def table_of_steps(records: Sequence[Record]) -> str:
    """When each method reaches its seed's best EMA, seed by seed, and how many steps BEMA saves."""
    rows: list[dict[str, Any]] = []
    for seed in dict.fromkeys(record['seed'] for record in records):
        own = select(records, seed=seed)
        best = min(record['ema'] for record in own)
        rows.append({'seed': seed, 'best EMA': best, **steps_to_best_ema(own), 'saved': steps_saved(own)})
    saved = [row['saved'] for row in rows]
    if None not in saved:
        blank = dict.fromkeys(rows[0])
        rows.append({**blank, 'seed': 'mean', 'saved': f'{statistics.fmean(saved):.1f}'})
        rows.append({**blank, 'seed': 'standard error', 'saved': f'{standard_error(saved):.1f}'})
    return markdown(rows)


def _as_text(value: Any) -> str:
    if value is None:
        return '-'
    return f'{value:.4f}' if isinstance(value, float) else str(value)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one a line."""
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def read_lines(path: Path) -> list[Record]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def parse_seeds(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    """Read an option that holds integers with commas between them."""
    del context, option
    try:
        return [int(seed) for seed in value.split(',')]
    except ValueError as error:
        raise click.BadParameter(f'seeds are integers with commas between them, not {value!r}') from error
