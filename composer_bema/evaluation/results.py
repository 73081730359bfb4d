# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What an evaluation leaves behind: every number as JSON, a table, and pictures over the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tabulate import tabulate

from composer_bema.evaluation.harness import Generation
from composer_bema.evaluation.loss import LOSS
from composer_bema.evaluation.measurements import Measurement
from composer_bema.evaluation.targets import Subject
from composer_bema.plots import plot_curves_with_errors

__all__ = ['Result', 'table_of', 'write_generations', 'write_results']

RESULTS_FILE = 'results.jsonl'
TABLE_FILE = 'table.md'
GENERATIONS_FILE = 'generations.jsonl'


class Result(NamedTuple):
    """What was measured of one subject."""

    subject: Subject
    measurements: Sequence[Measurement]


def write_results(results: Sequence[Result], tasks: Sequence[str], folder: Path) -> None:
    """Writes every measurement, the table of the tasks, and a picture for each of their metrics.

    Args:
        results (Sequence[Result]): The results.
        tasks (Sequence[str]): The tasks as they were named: the sets of questions within them are in no picture.
        folder (Path): Where.
    """
    with (folder / RESULTS_FILE).open('w', encoding='utf-8') as file:
        for subject, measurements in results:
            for measurement in measurements:
                file.write(json.dumps(_row(subject, measurement)) + '\n')
    (folder / TABLE_FILE).write_text(table_of(results, tasks, 'github') + '\n', encoding='utf-8')
    for task, metric in _columns(results, tasks):
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for subject, measurements in results:
            found = _find(measurements, task, metric)
            if found is not None and subject.step is not None and math.isfinite(found.value):
                error = math.nan if found.standard_error is None else found.standard_error
                curves.setdefault(subject.weights, []).append((subject.step, found.value, error))
        if curves:
            name = f'{task}-{metric}.png'.replace(' ', '-').replace('/', '-')
            label = f'{_text_or_task(task)} {metric}, with standard errors'
            plot_curves_with_errors(curves, folder / name, 'optimizer step', label)


def write_generations(subject: Subject, generations: Sequence[Generation], folder: Path) -> None:
    """Adds what a model has generated to the file of generations: a question a line."""
    with (folder / GENERATIONS_FILE).open('a', encoding='utf-8') as file:
        for generation in generations:
            row = {'weights': subject.weights, 'step': subject.step, **generation._asdict()}
            file.write(json.dumps(row, ensure_ascii=False) + '\n')


def table_of(results: Sequence[Result], tasks: Sequence[str], style: str = 'simple') -> str:
    """Returns a table of the tasks, with a row for each subject.

    Args:
        results (Sequence[Result]): The results.
        tasks (Sequence[str]): See :func:`write_results`.
        style (str): A format of ``tabulate``.
    """
    columns = _columns(results, tasks)
    rows = [
        [subject.weights, subject.step, *(_shown(_find(measurements, *column)) for column in columns)]
        for subject, measurements in results
    ]
    headers = ['weights', 'step', *(f'{_text_or_task(task)} {metric}' for task, metric in columns)]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def _text_or_task(task: str) -> str:
    # The metrics of texts say by themselves that they are losses and the like.
    return task.removeprefix(f'{LOSS}-')


def _columns(results: Sequence[Result], tasks: Sequence[str]) -> list[tuple[str, str]]:
    found = dict.fromkeys((m.task, m.metric) for _, measurements in results for m in measurements)
    return [(task, metric) for task, metric in found if task in tasks]


def _find(measurements: Sequence[Measurement], task: str, metric: str) -> Optional[Measurement]:
    return next((m for m in measurements if (m.task, m.metric) == (task, metric)), None)


def _shown(measurement: Optional[Measurement]) -> str:
    if measurement is None:
        return ''
    if measurement.standard_error is None:
        return f'{measurement.value:.4f}'
    return f'{measurement.value:.4f} ± {measurement.standard_error:.4f}'


def _row(subject: Subject, measurement: Measurement) -> dict[str, Any]:
    # JSON has no number for what is none.
    value, error = (
        x if x is not None and math.isfinite(x) else None for x in (measurement.value, measurement.standard_error)
    )
    return {
        'weights': subject.weights,
        **subject.settings,
        'step': subject.step,
        'task': measurement.task,
        'metric': measurement.metric,
        'value': value,
        'standard_error': error,
        'count': measurement.count,
    }
