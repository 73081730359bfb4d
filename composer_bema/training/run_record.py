# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the folder of a run says: its settings, its averages, and every number that was logged."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from composer_bema.algorithms.weight_averaging import WeightAveraging
from composer_bema.training.checks import build_named, check_time
from composer_bema.training.config import ConfigError, TrainConfig, load_config
from composer_bema.training.outputs import CONFIG_FILE, METRICS_FILE, evaluation_of, in_folder, read_metrics
from composer_bema.training.registry import find_builder

__all__ = ['Points', 'Run', 'check_folder_of_run', 'read_run']

Points = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    folder: Path
    config: TrainConfig
    records: list[dict[str, Any]]
    averages: list[WeightAveraging]
    curves: dict[str, Points]
    """Every number that was logged, by its name and its step; later lines win."""

    @functools.cached_property
    def evaluations(self) -> dict[str, dict[str, Points]]:
        """The evaluators' curves, by the metric and by the evaluator."""
        found: dict[str, dict[str, Points]] = {}
        for name, points in self.curves.items():
            label, metric = evaluation_of(name)
            if label:
                found.setdefault(metric, {})[label] = points
        return found

    @property
    def steps(self) -> int:
        """The optimizer steps that the last line counts."""
        return self.records[-1]['batch'] if self.records else 0

    @property
    def is_cut(self) -> bool:
        """Whether the last line of the metrics is unfinished."""
        with (self.folder / METRICS_FILE).open('rb') as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read() != b'\n'

    @property
    def resumptions(self) -> list[tuple[int, int]]:
        """The steps before and after each restart: while a run goes on, the step that begins is logged once."""
        found, before = [], -1
        for record in self.records:
            if 'time/batch' in record:
                if record['batch'] <= before:
                    found.append((before, record['batch']))
                before = record['batch']
        return found


def check_folder_of_run(folder: Path) -> None:
    """Check that a folder holds a run.

    Raises:
        FileNotFoundError: There is no such folder, or it lacks the settings or the metrics.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"No such folder of a run: '{folder}'.")
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"'{folder}' is no folder of a run: there is no {CONFIG_FILE} in it.")
    if not (folder / METRICS_FILE).is_file():
        raise FileNotFoundError(f"'{folder}' has no {METRICS_FILE}: its run has logged nothing.")


def read_run(folder: Path) -> Run:
    """Read a run's folder, which may have been moved since; of its algorithms the averages alone are built.

    Raises:
        ConfigError: The settings are damaged.
        ValueError: The metrics are damaged.
    """
    try:
        config = in_folder(load_config(folder / CONFIG_FILE), folder)
        for key in ('max_duration', 'save_interval'):
            check_time(getattr(config, key), key)
        named = {name: given for name, given in (config.algorithms or {}).items() if _is_average(name)}
        averages = build_named('algorithms', named)
    except ConfigError as error:
        raise ConfigError(f"The settings of the run in '{folder}' are damaged: {error}") from error
    records = read_metrics(folder / METRICS_FILE)
    return Run(folder, config, records, averages, _curves(records))


def _is_average(name: str) -> bool:
    builder = find_builder('algorithms', name, 'algorithms')
    return isinstance(builder, type) and issubclass(builder, WeightAveraging)


def _curves(records: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            number = _as_number(value)
            if number is not None and name not in ('batch', 'epoch', 'token'):
                curves.setdefault(name, {})[record['batch']] = number
    return {name: sorted(points.items()) for name, points in curves.items()}


def _as_number(value: Any) -> float | None:
    if isinstance(value, str):
        return float(value) if value in ('nan', 'inf', '-inf') else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
