# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A sweep over averages of checkpoints from its YAML: what it may say, how it evaluates, and what it leaves behind."""

import contextlib
import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from composer.core import Precision
from composer.trainer import Trainer
from composer.utils import dist
from tabulate import tabulate

from composer_bema.formats.huggingface import new_folder
from composer_bema.formats.tensors import dtype_named
from composer_bema.offline.loading import load_weights
from composer_bema.offline.plan import Average
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import write_averages
from composer_bema.offline.sweep import Evaluate, Result, best_results, evaluate_averages, expand_grid, folder_name
from composer_bema.offline.trajectory import Trajectory
from composer_bema.plots import plot_curves, plot_heat_map
from composer_bema.training.config import ConfigError, check_top_level, read_settings
from composer_bema.training.data.sections import build_evaluators, check_loader, eval_sections
from composer_bema.training.outputs import LOSS_METRIC
from composer_bema.training.registry import build, check_arguments, find_builder, split_name
from composer_bema.training.tokenizers import build_tokenizer, check_tokenizer

__all__ = ['EvaluateConfig', 'SweepConfig', 'WriteConfig', 'check_sweep', 'run_sweep']

T = TypeVar('T')

TABLE_FILE = 'results.csv'
LINES_FILE = 'results.jsonl'

_LISTS = ('at', 'copy')


@dataclasses.dataclass
class WriteConfig:
    """How averages are written as models."""

    format: str | None = None
    """``huggingface`` or ``composer``; None: the former where it is possible."""
    dtype: str | None = None
    """None: the checkpoints'."""
    max_shard_size: str = '5GB'


@dataclasses.dataclass
class EvaluateConfig:
    """The model and the data that averages are evaluated with; keys and meanings are those of a training YAML."""

    model: dict[str, Any]
    tokenizer: dict[str, Any]
    max_seq_len: int
    eval_loader: Any
    device_eval_batch_size: int
    precision: str | None = None
    eval_subset_num_batches: int = -1
    dtype: str | None = None
    """What the averages are held in; None: the checkpoints' dtype."""


@dataclasses.dataclass
class SweepConfig:
    """Every top-level key of a sweep's YAML."""

    averages: Any
    """Grids: ``rule`` and its settings, each a value or a list of values; one grid or a list of them."""
    at: list[int] = dataclasses.field(default_factory=list)
    """The step or steps at which averages are taken; none: the last update."""
    initial_model: str | None = None
    weights: str = 'training'
    copy: list[str] = dataclasses.field(default_factory=list)
    write: Any = None
    evaluate: Any = None
    variables: dict[str, Any] | None = None


def run_sweep(checkpoints: str | Path, config_file: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> str:
    """Compute every average that a YAML names, in one reading; return a table for people (on the first rank).

    Args:
        checkpoints: The directory of checkpoints.
        config_file: The YAML.
        out: The folder to make, of models or of results.
        overrides: ``key.path=value`` pairs.

    Raises:
        ConfigError: A setting is wrong.
        FileExistsError: ``out`` is there and is not an empty folder.
        ValueError: The checkpoints are damaged, missing, or do not fit together.
    """
    config = _read(config_file, overrides)
    settings, options = _checked(config)
    trajectory = Trajectory(checkpoints, initial_model=config.initial_model, weights=config.weights, copy=config.copy)
    averages = [average for setting in settings for average in trajectory.plan(setting, config.at)]
    if isinstance(options, WriteConfig):
        return _write(trajectory, averages, out, options)
    if dist.get_world_size() > 1:
        # Each would have its share of the averages only.
        raise ConfigError(f'evaluate takes one process, not {dist.get_world_size()}: start it without torchrun.')
    with new_folder(out) as folder:
        with _evaluator(options) as evaluate:
            dtype = dtype_named(options.dtype, 'evaluate.dtype')
            results = evaluate_averages(trajectory, averages, evaluate, dtype=dtype, show_progress=True)
        return _report(results, folder, Path(out))


def check_sweep(config_file: str | Path, overrides: Sequence[str] = ()) -> list[Setting]:
    """Check a sweep's YAML without reading data or checkpoints, and return the settings of its averages.

    Raises:
        ConfigError: A setting is wrong.
    """
    return _checked(_read(config_file, overrides))[0]


def _read(config_file: str | Path, overrides: Sequence[str]) -> SweepConfig:
    settings = read_settings(config_file, overrides)
    for name in _LISTS:
        value = settings.get(name)
        # One needs no brackets.
        values = value if value is None or isinstance(value, list) else [value]
        # OmegaConf lets these pass for whole numbers and texts.
        if any(isinstance(each, (list, Mapping)) for each in values or ()):
            raise ConfigError(f'{name} must be a value or a list of values, not {value!r}.')
        settings[name] = values
    return check_top_level(settings, SweepConfig)


def _checked(config: SweepConfig) -> tuple[list[Setting], WriteConfig | EvaluateConfig]:
    settings = _settings(config.averages)
    if (config.evaluate is None) == (config.write is None):
        raise ConfigError('A sweep needs one of two sections: write, for models, or evaluate, for their losses.')
    if config.write is not None:
        return settings, _section(config.write, WriteConfig, 'write')
    evaluation = _section(config.evaluate, EvaluateConfig, 'evaluate')
    _check_evaluation(evaluation)
    return settings, evaluation


def _section(content: Any, record: type[T], path: str) -> T:
    if not isinstance(content, Mapping):
        raise ConfigError(f'{path} must hold `key: value` pairs, not {content!r}.')
    return check_top_level(content, record, path)


def _settings(grids: Any) -> list[Setting]:
    settings = []
    for index, grid in enumerate(grids if isinstance(grids, list) else [grids]):
        path = f'averages.{index}' if isinstance(grids, list) else 'averages'
        if not isinstance(grid, Mapping):
            raise ConfigError(f'{path} must hold `key: value` pairs, not {grid!r}.')
        try:
            settings += expand_grid(grid)
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{path}: {error}') from error
    if not settings:
        raise ConfigError('averages is an empty list: give a grid, such as `{rule: bema}`, or several.')
    repeated = next((setting for setting in settings if settings.count(setting) > 1), None)
    if repeated is not None:
        raise ConfigError(f'averages: {repeated} is there twice.')
    return settings


def _write(trajectory: Trajectory, averages: Sequence[Average], out: str | Path, options: WriteConfig) -> str:
    names = {folder_name(average): average for average in averages}
    write_averages(trajectory, names, out, **dataclasses.asdict(options), show_progress=True)
    rows = [{**_described(average), 'folder': str(Path(out) / name)} for name, average in names.items()]
    return tabulate(rows, headers='keys')


def _check_evaluation(config: EvaluateConfig) -> None:
    check_tokenizer(config.tokenizer)
    name, arguments = split_name(config.model, 'model')
    check_arguments(find_builder('model', name, 'model.name'), arguments, 'model', ['tokenizer'])
    sections = eval_sections(config.eval_loader)
    if not sections:
        raise ConfigError('evaluate.eval_loader names no loader.')
    for path, section in sections.values():
        check_loader(section, path, config.max_seq_len)
    dtype_named(config.dtype, 'evaluate.dtype')
    known = [precision.value for precision in Precision]
    if config.precision not in (None, *known):
        raise ConfigError(f'evaluate.precision must be one of {", ".join(known)}, not {config.precision!r}.')


@contextlib.contextmanager
def _evaluator(config: EvaluateConfig) -> Iterator[Evaluate]:
    """Holds a function that puts weights into the model and returns its losses, by the evaluators' labels."""
    tokenizer = build_tokenizer(config.tokenizer)
    evaluators = build_evaluators(config.eval_loader, tokenizer, config.max_seq_len, config.device_eval_batch_size)
    name, arguments = split_name(config.model, 'model')
    model = build(find_builder('model', name, 'model.name'), arguments, 'model', tokenizer=tokenizer)
    trainer = Trainer(
        model=model,
        eval_dataloader=evaluators,
        eval_subset_num_batches=config.eval_subset_num_batches,
        precision=config.precision or ('amp_bf16' if torch.cuda.is_available() else 'fp32'),
        progress_bar=False,
    )

    def evaluate(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        load_weights(model, weights, 'the model that evaluate.model names')
        trainer.eval()
        metrics = trainer.state.eval_metrics
        return {evaluator.label: float(metrics[evaluator.label][LOSS_METRIC].compute()) for evaluator in evaluators}

    try:
        yield evaluate
    finally:
        trainer.close()


def _report(results: Sequence[Result], folder: Path, out: Path) -> str:
    """Writes tables and pictures into a folder that will be ``out``; returns a table for people."""
    # JSON has no number for a loss that is none.
    rows = [
        {**_described(result.average), **{n: x if math.isfinite(x) else None for n, x in result.losses.items()}}
        for result in results
    ]
    with (folder / LINES_FILE).open('w', encoding='utf-8') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    with (folder / TABLE_FILE).open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    for label in results[0].losses:
        _draw(results, label, folder)
    best = [
        f'Best {rule} by {label}: {result.average.setting} at step {result.average.step}, {result.losses[label]:.4f}'
        for (label, rule), result in best_results(results).items()
    ]
    files = ', '.join(str(out / path.name) for path in sorted(folder.iterdir()))
    return '\n'.join([tabulate(rows, headers='keys', floatfmt='.4f'), '', *best, '', files])


def _draw(results: Sequence[Result], label: str, folder: Path) -> None:
    """Draws losses over the steps, over each setting that varies, and over kappa and eta, as far as these vary."""
    loss = 'loss (nats per token)'
    if len({result.average.step for result in results}) > 1:
        curves: dict[str, list[tuple[float, float]]] = {}
        for result in results:
            curves.setdefault(str(result.average.setting), []).append((result.average.step, result.losses[label]))
        plot_curves(curves, folder / f'loss-{label}.png', 'optimizer step', loss)
    last = max(result.average.step for result in results)
    final = [result for result in results if result.average.step == last]
    for name in dict.fromkeys(name for result in final for name in result.average.setting.options):
        best = _best(final, label, (name,))
        curves = {rule: sorted((x, y) for (x,), y in cells.items()) for rule, cells in best.items() if len(cells) > 1}
        if curves:
            plot_curves(curves, folder / f'{name}-{label}.png', name, loss)
    for rule, cells in _best(final, label, ('ema_power', 'bias_power')).items():
        if all(len({key[axis] for key in cells}) > 1 for axis in (0, 1)):
            plot_heat_map(cells, folder / f'heat-map-{rule}-{label}.png', 'ema_power', 'bias_power', loss)


def _best(results: Sequence[Result], label: str, names: tuple[str, ...]) -> dict[str, dict[Any, float]]:
    """Returns the lowest loss for each value of some settings, whatever the others are, by the rule."""
    best: dict[str, dict[Any, float]] = {}
    for result in results:
        key = tuple(result.average.setting.options.get(name) for name in names)
        if all(isinstance(value, (int, float)) for value in key) and math.isfinite(result.losses[label]):
            cells = best.setdefault(result.average.setting.rule, {})
            cells[key] = min(result.losses[label], cells.get(key, math.inf))
    return best


def _described(average: Average) -> dict[str, Any]:
    return {'rule': average.setting.rule, **average.setting.given, 'step': average.step}
