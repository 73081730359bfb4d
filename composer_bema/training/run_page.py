# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A run as one HTML page: its settings, curves, averages and checkpoints, as its folder has them.

The page needs nothing else: pictures and style are in it, it has no scripts, and it tells browsers to fetch nothing.
Nothing that the folder holds is executed, and of its checkpoints no tensor is read.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from composer.core import Time, TimeUnit
from composer.utils import format_name_with_dist
from composer.utils.file_helpers import is_uri
from jinja2 import Environment, PackageLoader, StrictUndefined

from composer_bema.algorithms.weight_averaging import WeightAveraging
from composer_bema.formats.completeness import INCOMPLETE, SavedCheckpoint, saved_checkpoints, why_incomplete
from composer_bema.formats.composer import open_checkpoint
from composer_bema.plots import STROKES, draw_curves
from composer_bema.training.config import TrainConfig
from composer_bema.training.outputs import (
    CONFIG_FILE,
    LOSS_METRIC,
    METRICS_FILE,
    PREFERENCE_METRICS,
    perplexity,
)
from composer_bema.training.run_record import Points, Run, check_folder_of_run, read_run
from composer_bema.training.weighing import Clock, weigh
from composer_bema.version import __version__

__all__ = ['write_run_page']

TRAINING_LOSS = 'loss/train/total'
# What the pictures of metrics are called; others by their names.
TITLES = {LOSS_METRIC: 'loss (nats per token)', **PREFERENCE_METRICS, 'PreferenceLoss': 'loss (preferences)'}
# A function of the loss, which is drawn.
NOT_DRAWN = ('LanguagePerplexity',)
# How metrics are shown in tables.
DECIMALS = {'RewardAccuracy': 3, 'LogProbChosen': 2, 'LogProbRejected': 2}

# The most points of a curve that are drawn one by one.
MOST_POINTS = 600
# The most rows of a table of values.
MOST_ROWS = 200
# How many times the largest of the other weights those at the ends may be to be drawn with them.
END_RATIO = 4
# The most steps that a sentence lists.
MOST_LISTED = 12
# The lines of a setting, and the characters of a line, above which it is folded.
MOST_LINES, MOST_CHARACTERS = 8, 200


class Table(NamedTuple):
    """Rows of cells under headers; the first cell of a row is what the row is about."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


class Curve(NamedTuple):
    """A name in a legend, and how its line is drawn."""

    name: str
    colour: str
    dashes: str


class Picture(NamedTuple):
    """A drawing with all that says the same in words."""

    title: str
    svg: str
    alternative: str
    legend: Sequence[Curve]
    notes: Sequence[str]
    values: Table | None


class Setting(NamedTuple):
    """A key of the settings, its value as YAML, and whether that is long."""

    name: str
    value: str
    is_long: bool


def write_run_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write an HTML page about a run, which takes the place of an older one when it is complete.

    Args:
        folder: The run's folder, with its settings and its metrics; the run may be going on.
        out: The file, in a folder that is there; None: ``report.html`` in the run's.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no run.
        ConfigError: The settings are damaged.
        ValueError: The metrics are damaged, or the page would replace a file of the run's.
    """
    folder = Path(folder)
    path = folder / 'report.html' if out is None else Path(out)
    check_folder_of_run(folder)
    _check_place(path, folder)
    text = _render(read_run(folder))
    unfinished = path.with_name(f'.{path.name}')
    # Of surrogates, which JSON and file names may have, there is no UTF-8.
    unfinished.write_text(text, encoding='utf-8', errors='replace')
    unfinished.replace(path)
    return path


def _check_place(path: Path, folder: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{path.parent}' for the page '{path}': make it, or name another.")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder: name a file for the page, such as '{path / 'report.html'}'.")
    if any(path.resolve() == (folder / name).resolve() for name in (CONFIG_FILE, METRICS_FILE)):
        raise ValueError(f"'{path}' is a file of the run: name another one for the page.")


def _render(run: Run) -> str:
    environment = Environment(
        loader=PackageLoader('composer_bema.training', ''),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    checkpoints, checkpoint_notes = _checkpoints(run)
    given, at_defaults = _settings(run.config)
    return environment.get_template('run_page.html').render(
        name=str(run.config.run_name),
        version=__version__,
        notes=_notes(run),
        facts=_facts(run),
        evaluations=_evaluation_table(run),
        evaluation_pictures=_evaluation_pictures(run),
        averages=_average_table(run),
        average_settings=[repr(average) for average in run.averages],
        average_notes=_average_notes(run),
        average_pictures=_average_pictures(run),
        **_weighings(run),
        checkpoints=checkpoints,
        checkpoint_notes=checkpoint_notes,
        settings=given,
        default_settings=at_defaults,
        metrics=_all_metrics(run),
    )


# The summary


def _facts(run: Run) -> list[tuple[str, str]]:
    last = run.records[-1] if run.records else {}
    model = [str(run.config.model.get(key)) for key in ('name', 'pretrained_model_name_or_path')]
    facts = {
        'Folder': str(run.folder),
        'Model': ', '.join(part for part in model if part != 'None'),
        'Length': f'{run.config.max_duration} (max_duration)',
        'Steps done': f'{run.steps:,}',
        'Epochs done': f'{last.get("epoch", 0):,}',
        'Tokens seen': f'{last["token"]:,}' if last.get('token') else 'not counted',
    }
    written = datetime.fromtimestamp((run.folder / METRICS_FILE).stat().st_mtime, timezone.utc)
    return [*facts.items(), ('Last metrics', f'{written:%Y-%m-%d %H:%M} UTC')]


def _notes(run: Run) -> list[str]:
    """What a reader has to know about the run before its numbers."""
    notes = [_progress(run)]
    if run.is_cut:
        notes.append(f'The last line of {METRICS_FILE} is unfinished, as a killed run leaves it, and is passed over.')
    if run.records and run.records[0]['batch'] > 0:
        source = f' from {run.config.load_path}' if run.config.load_path else ''
        notes.append(f'The metrics begin at step {run.records[0]["batch"]}: the run went on{source}.')
    notes += [
        f'The run was resumed at step {to}, after step {before} had been logged; of steps that were repeated the later '
        'values are shown.'
        for before, to in run.resumptions
    ]
    if not run.evaluations:
        notes.append('There are no evaluations in the metrics.')
    if not run.averages:
        notes.append('The run keeps no average of its weights: all numbers are those of the training weights.')
    for name, points in run.curves.items():
        bad = [step for step, value in points if not math.isfinite(value)]
        if bad:
            notes.append(f'{name} is not finite at {len(bad)} of {len(points)} steps, the first of which is {bad[0]}.')
    return notes


def _progress(run: Run) -> str:
    if not run.records:
        return 'Nothing has been logged yet.'
    length = Time.from_input(run.config.max_duration, 'ep')
    counts = {TimeUnit.BATCH: run.steps, TimeUnit.EPOCH: run.records[-1].get('epoch')}
    counts |= {TimeUnit.TOKEN: run.records[-1].get('token'), TimeUnit.SAMPLE: _last(run.curves.get('time/sample'))}
    done = counts.get(length.unit)
    if done is None:
        return f'The metrics do not say how much of {run.config.max_duration} is done.'
    if done >= length.value:
        return f'The run has reached its end: {length.to_timestring()}.'
    return (
        f'The run has not reached its end: {done:g} of {length.to_timestring()} are done. It goes on, was stopped, or '
        'was killed.'
    )


def _evaluation_table(run: Run) -> Table | None:
    """The last values of each evaluator, and the best of its losses."""
    evaluations = run.evaluations
    if not evaluations:
        return None
    loss = next((metric for metric in (LOSS_METRIC, 'PreferenceLoss') if metric in evaluations), None)
    preferences = [metric for metric in PREFERENCE_METRICS if metric in evaluations]
    shown = {LOSS_METRIC: [LOSS_METRIC], 'PreferenceLoss': preferences, None: list(evaluations)}[loss]
    headers = ['Evaluator', 'weights', 'last step', *(TITLES.get(metric, metric) for metric in shown)]
    headers += ['perplexity'] if loss == LOSS_METRIC else []
    headers += ['lowest loss', 'at step'] if loss else []
    rows = []
    for label, points in evaluations[loss or shown[0]].items():
        step, value = points[-1]
        row = [label, _weights_of(run, label), f'{step:,}']
        row += [_decimal(_last(evaluations[metric].get(label)), DECIMALS.get(metric, 4)) for metric in shown]
        row += [_decimal(perplexity(value), 3)] if loss == LOSS_METRIC else []
        rows.append([*row, *_lowest(points)] if loss else row)
    return Table(headers, rows)


def _lowest(points: Points) -> list[str]:
    step, value = min(points, key=lambda point: point[1] if not math.isnan(point[1]) else math.inf)
    return [_decimal(value, 4), f'{step:,}']


def _weights_of(run: Run, label: str) -> str:
    names = [type(a).__name__ for a in run.averages if a.eval_labels is None or label in a.eval_labels]
    return names[0] if names else 'training'


# Pictures


def _picture(
    prefix: str,
    title: str,
    curves: Mapping[str, Points],
    y_label: str,
    notes: Sequence[str] = (),
    *,
    x_label: str = 'optimizer step',
    has_values: bool = False,
) -> list[Picture]:
    """A picture, or none where no point is finite; the prefix is what its ids begin with."""
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return []
    every = max(math.ceil(len(points) / MOST_POINTS) for points in finite.values())
    thinned = {name: _thinned(points, every) for name, points in finite.items()}
    if every > 1:
        notes = [*notes, f'A point is the mean of {every} in a row; the first and the last are single ones.']
    ends = [
        f'{name} from {points[0][1]:.4g} at {points[0][0]} to {points[-1][1]:.4g} at {points[-1][0]}'
        for name, points in finite.items()
    ]
    return [
        Picture(
            title,
            draw_curves(thinned, x_label, y_label, prefix),
            f'Curves of {title} over the {x_label}: {"; ".join(ends)}.',
            [Curve(name, *stroke) for name, stroke in zip(finite, cycle(STROKES), strict=False)],
            notes,
            _values(curves) if has_values else None,
        )
    ]


def _thinned(points: Points, every: int) -> Points:
    """Curves of thousands of points as those of means, but for the ends."""
    if every == 1:
        return points
    inner = points[1:-1]
    groups = [inner[start : start + every] for start in range(0, len(inner), every)]
    means = [(round(_mean([x for x, _ in group])), _mean([y for _, y in group])) for group in groups]
    return [points[0], *means, points[-1]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _values(curves: Mapping[str, Points]) -> Table:
    columns = [dict(points) for points in curves.values()]
    steps = sorted({step for column in columns for step in column})
    rows = [[f'{step:,}', *(_decimal(column.get(step), 4) for column in columns)] for step in steps[-MOST_ROWS:]]
    return Table(['step', *curves], rows)


def _evaluation_pictures(run: Run) -> list[Picture]:
    evaluations = run.evaluations
    ordered = [metric for metric in TITLES if metric in evaluations]
    ordered += [metric for metric in evaluations if metric not in TITLES and metric not in NOT_DRAWN]
    drawn = []
    for number, metric in enumerate(ordered):
        # What a metric is called may be any text, which is not for axes.
        title, y_label = TITLES.get(metric, metric), TITLES.get(metric, 'value')
        curves = evaluations[metric]
        drawn += _picture(f'evaluation-{number}', f'Evaluation: {title}', curves, y_label, has_values=True)
    note = 'Of each batch, with the training weights before the step that learns from it.'
    training = {'training loss': run.curves.get(TRAINING_LOSS, [])}
    return drawn + _picture('training-loss', 'Training loss', training, 'loss', [note])


# Averages


def _prefix(average: WeightAveraging) -> str:
    return type(average).__name__.lower()


def _of(run: Run, average: WeightAveraging, name: str) -> Points:
    return run.curves.get(f'{_prefix(average)}/{name}', [])


def _average_table(run: Run) -> Table | None:
    if not run.averages:
        return None
    rows = []
    for average in run.averages:
        updates = _of(run, average, 'num_updates')
        labels = 'all' if average.eval_labels is None else ', '.join(average.eval_labels)
        rows.append(
            [
                type(average).__name__,
                f'{updates[-1][1]:,}' if updates else '0',
                f'{updates[-1][0]:,}' if updates else '–',
                *(_significant(_last(_of(run, average, name))) for name in ('alpha', 'beta', 'distance')),
                labels or 'none',
            ]
        )
    return Table(['Average', 'updates', 'last at step', 'last alpha', 'last beta', 'last distance', 'evaluators'], rows)


def _average_notes(run: Run) -> list[str]:
    notes = []
    for average in run.averages:
        name = type(average).__name__
        if not _of(run, average, 'num_updates'):
            notes.append(f'{name} has had no update yet: until its first one, evaluations see the training weights.')
        skipped = _last(_of(run, average, 'num_skipped'))
        if skipped:
            notes.append(f'{name} has skipped {skipped:g} updates, because a weight was not finite.')
        references = [step for step, _ in _of(run, average, 'num_ref_model_updates')]
        if references:
            times = 'once, at step' if len(references) == 1 else f'{len(references)} times, at steps'
            notes.append(f'The reference model has become the {name} weights {times} {_listed(references)}.')
        elif getattr(average, 'reference_updates', None) is not None:
            notes.append(f'The reference model has not become the {name} weights yet.')
    return notes


def _average_pictures(run: Run) -> list[Picture]:
    drawn = []
    for name, title, note in (
        ('alpha', 'Alpha, the strength of the correction', 'At each update.'),
        ('beta', 'Beta, the weight of the newest weights', 'At each update.'),
        ('distance', 'Distance of the average', 'Euclidean, to the training weights, at the evaluations that see it.'),
    ):
        curves = {type(average).__name__: _of(run, average, name) for average in run.averages}
        drawn += _picture(name, title, curves, name, [note])
    return drawn


def _weighings(run: Run) -> dict[str, Any]:
    """What past steps weigh in each average: a table, pictures, and why there is none of some."""
    rows, drawn, notes = [], [], []
    clock = Clock(run.records, run.config.max_duration)
    for average in run.averages:
        name, updates = type(average).__name__, _updates(run, average)
        if not updates:
            continue
        try:
            weighing = weigh(average, updates, clock)
        except ValueError as error:
            notes.append(f'What past steps weigh in the {name} cannot be told: {error}.')
            continue
        points = list(zip(weighing.steps, weighing.coefficients.tolist(), strict=True))
        (first, start), *between, (last, newest) = points
        weights = [start, math.fsum(c for _, c in between), newest, math.fsum(weighing.coefficients)]
        rows.append([name, f'{first:,}', f'{last:,}', *(_decimal(weight, 4) for weight in weights)])
        drawn += _weighing_picture(name, points)
    headers = ['Average', 'starts at step', 'last update', 'start', 'all between', 'newest', 'sum']
    return {
        'weighings': Table(headers, rows) if rows else None,
        'weighing_pictures': drawn,
        'weighing_notes': notes,
    }


def _weighing_picture(name: str, points: Points) -> list[Picture]:
    """The weights of the past; without an end beside which all others would lie on the axis."""
    limit = END_RATIO * max((abs(weight) for _, weight in points[1:-1]), default=0) or math.inf
    left_out = [(step, weight) for step, weight in points if abs(weight) > limit]
    notes = [f'Not drawn: {weight:.4f} at step {step:,}.' for step, weight in left_out]
    drawn = {name: [point for point in points if point not in left_out]}
    title, x_label = f'Weights in the {name}', 'step of the past weights'
    return _picture(f'weights-{name}', title, drawn, 'weight', notes, x_label=x_label)


def _updates(run: Run, average: WeightAveraging) -> dict[int, dict[str, float]]:
    """What was logged of each update, by its step."""
    columns = {name: dict(_of(run, average, name)) for name in ('num_updates', 'alpha', 'beta')}
    steps = columns['num_updates']
    return {step: {name: column[step] for name, column in columns.items() if step in column} for step in steps}


# Checkpoints


def _checkpoints(run: Run) -> tuple[Table | None, list[str]]:
    config = run.config
    if config.save_folder is None:
        return None, ['The run saves no checkpoints: save_folder is not set.']
    if is_uri(config.save_folder):
        return None, [f'The checkpoints are kept at {config.save_folder}, which is not on this machine.']
    folder = Path(format_name_with_dist(config.save_folder, str(config.run_name)))
    saved = sorted(saved_checkpoints(folder))
    notes = [f'They are in {folder}.'] if saved else [f'There are no checkpoints in {folder}.']
    if config.save_num_checkpoints_to_keep >= 0:
        kept = config.save_num_checkpoints_to_keep
        notes.append(f'Each start of the run keeps the last {kept} that it saves (save_num_checkpoints_to_keep).')
    else:
        notes += _missing_checkpoints(run, [checkpoint.batch for checkpoint in saved])
    aside = sorted(path.name for path in folder.glob(f'*{INCOMPLETE}'))
    if aside:
        notes.append(f'A resumed run has set aside, as not whole: {", ".join(aside)}.')
    if not saved:
        return None, notes
    rows = [_checkpoint_row(checkpoint) for checkpoint in saved]
    return Table(['File', 'step', 'epoch', 'size', "the model's weights", 'averages', 'state'], rows), notes


def _missing_checkpoints(run: Run, steps: Sequence[int]) -> list[str]:
    """A sentence about the checkpoints that the interval should have left, where it counts steps."""
    interval = Time.from_input(run.config.save_interval, 'ep')
    if interval.unit != TimeUnit.BATCH or interval.value < 1 or not run.records:
        return []
    # That of the last step may be about to be written.
    due = range(interval.value, run.steps, interval.value)
    missing = [step for step in due if step > run.records[0]['batch'] and step not in steps]
    return [f'There is none of the steps {_listed(missing)}, at which one was due.'] if missing else []


def _checkpoint_row(saved: SavedCheckpoint) -> list[str]:
    cells = [saved.path.name, f'{saved.batch:,}', f'{saved.epoch:,}']
    try:
        cells.append(_size(saved.path))
        problem = why_incomplete(saved.path)
        if problem:
            return [*cells, '–', '–', f'incomplete: {problem}']
        checkpoint = open_checkpoint(saved.path)
    except (ValueError, OSError) as error:
        return [*cells, *['–'] * (6 - len(cells)), f'cannot be read: {error}']
    # Without a clock it is one of weights only, which has no entry that says whose they are.
    holds = checkpoint.model_holds if checkpoint.timestamp is not None else 'not recorded (save_weights_only)'
    return [*cells, holds, ', '.join(checkpoint.average_names) or 'none', 'complete']


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ('B', 'kB', 'MB', 'GB'):
        if size < 1000:
            return f'{size:.3g}\u00a0{unit}'
        size /= 1000
    return f'{size:.3g}\u00a0TB'


# Settings, and all the metrics


def _settings(config: TrainConfig) -> tuple[list[Setting], list[Setting]]:
    """The settings that say something, and those that are left at their defaults."""
    given, at_defaults = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).removesuffix('...\n').rstrip()
        is_long = text.count('\n') >= MOST_LINES or any(len(line) > MOST_CHARACTERS for line in text.splitlines())
        setting = Setting(field.name, text, is_long)
        (at_defaults if value == field.default else given).append(setting)
    return given, at_defaults


def _all_metrics(run: Run) -> Table:
    rows = [[name, _significant(points[-1][1]), f'{points[-1][0]:,}'] for name, points in sorted(run.curves.items())]
    return Table(['Metric', 'last value', 'at step'], rows)


# Numbers


def _last(points: Points | None) -> float | None:
    return points[-1][1] if points else None


def _decimal(value: float | None, places: int) -> str:
    return '–' if value is None else f'{value:.{places}f}'


def _significant(value: float | None) -> str:
    if value is None:
        return '–'
    return f'{value:,}' if isinstance(value, int) else f'{value:.6g}'


def _listed(steps: Sequence[int]) -> str:
    shown = [f'{step:,}' for step in steps]
    if len(shown) > MOST_LISTED:
        shown[MOST_LISTED // 2 : -MOST_LISTED // 2] = ['...']
    return ', '.join(shown)
