# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a run leaves in its folder: its settings, every metric, a picture of its evaluations; and its closing words."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from omegaconf import OmegaConf
from tabulate import tabulate

from composer_bema.formats.composer import TRAINING
from composer_bema.plots import plot_curves
from composer_bema.training.config import ConfigError, TrainConfig

__all__ = [
    'CONFIG_FILE',
    'LOSS_METRIC',
    'METRICS_FILE',
    'PREFERENCE_METRICS',
    'WHERE',
    'MetricsFile',
    'by_dotted_keys',
    'check_run_folder',
    'evaluation_curves',
    'evaluation_of',
    'goes_on',
    'in_folder',
    'is_below',
    'perplexity',
    'read_metrics',
    'report',
    'run_folder_of',
    'write_settings',
]

CONFIG_FILE = 'config.yaml'
METRICS_FILE = 'metrics.jsonl'
CURVES_FILE = 'curves.png'

# The settings that say where a run writes.
WHERE = ('run_folder', 'save_folder', 'callbacks', 'loggers')

# How far below its run's folder a checkpoint may lie.
CHECKPOINT_DEPTH = 3

LOSS_METRIC = 'LanguageCrossEntropy'
# The columns of the table of a run on preferences.
PREFERENCE_METRICS = {
    'PreferenceLoss': 'loss',
    'RewardMargin': 'margin',
    'RewardAccuracy': 'accuracy',
    'ReferenceKL': 'KL (nats per token)',
    'LogProbChosen': 'log p(chosen)',
    'LogProbRejected': 'log p(rejected)',
}


class MetricsFile(LoggerDestination):
    """Writes every metric when it is logged: a JSON object a line, with its ``batch``, ``epoch`` and ``token``.

    Lines are flushed one by one, so that a killed run keeps them. A resumed run appends, and so repeats the steps
    between the last checkpoint and the end of the run before it; readers take the later line. Values that JSON has no
    number for are written as the strings ``nan``, ``inf`` and ``-inf``, which ``float()`` takes back.

    Args:
        path: The file; only rank 0 writes it.
        goes_on: Whether a resumed run appends to it; a branch from another run's checkpoint does not.
    """

    def __init__(self, path: str | Path, goes_on: bool = True) -> None:
        self.path = Path(path)
        self.goes_on = goes_on
        self.file: TextIO | None = None
        self.state: State | None = None

    def init(self, state: State, logger: Logger) -> None:
        del logger
        self.state = state

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        del step
        if dist.get_global_rank() != 0 or not metrics:
            return
        assert self.state is not None
        if self.file is None:
            # Opened late: only now is it known whether a checkpoint has been loaded.
            is_new = self.state.timestamp.batch == 0 or not self.goes_on
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not is_new:
                _drop_unfinished_line(self.path)
            self.file = self.path.open('w' if is_new else 'a', buffering=1, encoding='utf-8')
        timestamp = self.state.timestamp
        time = {unit: timestamp.get(unit).value for unit in ('batch', 'epoch', 'token')}
        self.file.write(json.dumps({**time, **{name: _as_json(value) for name, value in metrics.items()}}) + '\n')

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        if self.file is not None:
            self.file.close()
            self.file = None


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed run was writing, or the next line would become part of it."""
    if path.exists():
        text = path.read_bytes()
        with path.open('r+b') as file:
            file.truncate(text.rfind(b'\n') + 1)


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if hasattr(value, 'item'):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)


def check_run_folder(config: TrainConfig) -> Path:
    """The run's folder, which is not made yet; refuse to mix with another run.

    Raises:
        ConfigError: The folder holds a run, and the settings say neither to replace it nor to go on with it.
    """
    folder = Path(str(config.run_folder))
    if (folder / METRICS_FILE).exists() and not goes_on(config) and not config.save_overwrite:
        raise ConfigError(
            f"'{folder}' holds a run already; give another run_name, or set save_overwrite=true to replace it or "
            'autoresume=true to go on with it.',
        )
    dist.barrier()  # no rank may look after rank 0 has begun to write
    return folder


def goes_on(config: TrainConfig) -> bool:
    """Whether a run goes on from where it was, rather than from another run's checkpoint or from none."""
    if config.autoresume:
        return True
    if config.load_path is None or config.load_weights_only:
        return False
    folder = run_folder_of(config.load_path)
    return folder is None or os.path.realpath(folder) == os.path.realpath(str(config.run_folder))


def run_folder_of(checkpoint: str | Path) -> Path | None:
    """The folder with the settings of the run that a checkpoint lies below, if it lies below one."""
    folders = Path(os.path.abspath(checkpoint)).parents[:CHECKPOINT_DEPTH]
    return next((folder for folder in folders if (folder / CONFIG_FILE).is_file()), None)


def in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    """Settings with all that lies in their run's folder moved to another one."""
    old = os.path.normpath(str(config.run_folder))
    return dataclasses.replace(config, **{key: _moved(getattr(config, key), old, str(folder)) for key in WHERE})


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path leads to a folder or into it, by whatever links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _moved(value: Any, folder: str, to: str) -> Any:
    """A setting with the paths in it that lie in one folder moved to the other."""
    if isinstance(value, Mapping):
        return {key: _moved(item, folder, to) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, folder, to) for item in value]
    if isinstance(value, str) and Path(value).is_relative_to(folder):
        return os.path.normpath(os.path.join(to, os.path.relpath(value, folder)))
    return value


def write_settings(config: TrainConfig, folder: Path) -> None:
    """Make the run's folder and write the settings there (rank 0), when all that they name has been built."""
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), folder / CONFIG_FILE)


def by_dotted_keys(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Settings as loggers take them, each by its whole key: ``optimizer.lr``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        # An empty section is a setting too.
        nested = isinstance(value, Mapping) and bool(value)
        flat |= by_dotted_keys(value, f'{prefix}{key}.') if nested else {f'{prefix}{key}': value}
    return flat


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a killed run left unfinished is passed over.

    Raises:
        ValueError: Another line is damaged.
    """
    records = []
    lines = Path(path).read_bytes().split(b'\n')
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record['batch'], int):
                raise TypeError('batch')
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Line {number} of '{path}' is damaged: it is no JSON object with the number of its batch; remove it, "
                'or restore the file.'
            ) from error
        records.append(record)
    return records


def evaluation_curves(
    records: Iterable[dict[str, Any]], metric: str = LOSS_METRIC
) -> dict[str, list[tuple[int, float]]]:
    """Each evaluator's values of a metric by optimizer step, from the lines of a metrics file.

    Args:
        records: The lines.
        metric: The metric's name; by default the loss in nats a token.
    """
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            label, measured = evaluation_of(name)
            if label and measured == metric:
                curves.setdefault(label, {})[record['batch']] = float(value)
    return {label: sorted(points.items()) for label, points in curves.items()}


def evaluation_of(name: str) -> tuple[str, str]:
    """The evaluator's label and the metric in a name of a metrics file; both are empty for what is no evaluation."""
    group, _, rest = name.partition('/')
    label, _, metric = rest.rpartition('/')
    return (label, metric) if group == 'metrics' and label != 'train' else ('', '')


def report(folder: str | Path, weights: Mapping[str, str]) -> str:
    """Draw the evaluators' curves into the run's folder; return a table of their last losses, and the files' names.

    Args:
        folder: The run's folder.
        weights: The average that an evaluator sees, by its label; others see the training weights.
    """
    folder = Path(folder)
    records = read_metrics(folder / METRICS_FILE)
    files = {'settings': CONFIG_FILE, 'metrics': METRICS_FILE}
    losses, margins = evaluation_curves(records), evaluation_curves(records, 'RewardMargin')
    table = ''
    if losses:
        plot_curves(losses, folder / CURVES_FILE, 'optimizer step', 'loss (nats per token)')
        table = _table_of_losses(losses, weights)
    elif margins:
        plot_curves(margins, folder / CURVES_FILE, 'optimizer step', 'reward margin (nats)')
        table = _table_of_preferences(records, weights)
    if table:
        files['curves'] = CURVES_FILE
    return table + ', '.join(f'{what}: {folder / name}' for what, name in files.items())


def _table_of_losses(curves: Mapping[str, list[tuple[int, float]]], weights: Mapping[str, str]) -> str:
    rows = [
        [label, weights.get(label, TRAINING), *points[-1], perplexity(points[-1][1])]
        for label, points in curves.items()
    ]
    headers = ['evaluator', 'weights', 'step', 'loss', 'perplexity']
    return tabulate(rows, headers, floatfmt=('', '', '', '.4f', '.3f')) + '\n\n'


def _table_of_preferences(records: list[dict[str, Any]], weights: Mapping[str, str]) -> str:
    columns = [evaluation_curves(records, metric) for metric in PREFERENCE_METRICS]
    rows = [
        [label, weights.get(label, TRAINING), points[-1][0], *(column[label][-1][1] for column in columns)]
        for label, points in columns[0].items()
    ]
    headers = ['evaluator', 'weights', 'step', *PREFERENCE_METRICS.values()]
    return tabulate(rows, headers, floatfmt=('', '', '', '.4f', '.4f', '.3f', '.4f', '.2f', '.2f')) + '\n\n'


def perplexity(loss: float) -> float:
    """The perplexity of a loss in nats a token."""
    # exp overflows a float above 709.
    return math.inf if loss >= 709 else math.exp(loss)
