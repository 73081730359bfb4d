# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A classifier with BatchNorm on scikit-learn's digits: training weights, EMA and BEMA, over five seeds.

    python benchmarks/evidence_digits.py
    python benchmarks/evidence_digits.py --seeds 1,2 --steps 100

Run it from the repository's root, with scikit-learn installed; its tables and its picture go to runs/evidence/digits.
Settings are chosen on validation images with seeds of their own, EMA and BEMA each among as many, and reported on test
images by one Trainer a seed. All of it is done at two rates, and at each with BatchNorm's statistics averaged and with
the newest copied.
"""

import copy
import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch is loaded.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import click
import torch
from composer import Evaluator, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import reproducibility
from over_seeds import (
    METHODS,
    TITLES,
    Record,
    best_settings,
    curve_over_seeds,
    describe,
    markdown,
    mean_record,
    parse_seeds,
    select,
    table_of_seeds,
    table_of_steps,
    write_lines,
)
from sklearn.datasets import load_digits
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from composer_bema import BEMA, EMA
from composer_bema.offline.settings import Setting
from composer_bema.offline.sweep import evaluate_averages, expand_grid
from composer_bema.offline.trajectory import Trajectory
from composer_bema.plots import Panel, plot_panels

OUT = Path('runs/evidence/digits')

STEPS = 400
INTERVAL = 5  # steps from one update of an average to the next
EVALUATE_EVERY = 10  # steps
DRAW_EVERY = 20  # steps
# At the higher rate the last step's weights differ so much between runs that one of them would choose by chance.
TUNING_SEEDS = (0, 6, 7)
BATCH_SIZE = 8
LEARNING_RATES = (0.01, 0.1)
MOMENTUM = 0.9
PARTS = {'train': 797, 'validation': 400, 'test': 600}  # images

# What becomes of BatchNorm's statistics, and which tensors a sweep then has to copy.
STATISTICS: dict[str, tuple[str, ...]] = {'averaged': (), 'copied': ('*running_mean', '*running_var')}
# Thirty-six settings of each method: eighteen constant rates, and eighteen that decay as a power of the step.
GRIDS: tuple[dict[str, Any], ...] = (
    {'rule': 'ema', 'half_life': [2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 60, 80, 110, 150, 200, 300, 400, 600]},
    {'rule': 'bema', 'half_life': [5, 12, 30, 75, 180, 450], 'bias_power': [0.4, 0.6, 0.8]},
    {'rule': 'ema', 'ema_power': [0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0], 'lag': [1, 10]},
    {'rule': 'bema', 'ema_power': [0.5, 0.7, 0.8, 0.9, 1.0, 1.1], 'bias_power': [0.2, 0.4, 0.6]},
)
METRICS = {'loss': 'CrossEntropy', 'accuracy': 'MulticlassAccuracy'}

Settings = dict[str, Record]
"""A setting by its rule."""


class Case(NamedTuple):
    """What is compared."""

    rate: float
    statistics: str

    def __str__(self) -> str:
        return f'rate {self.rate:g}, statistics {self.statistics}'


def load_parts() -> dict[str, TensorDataset]:
    """The digits in a shuffled order, the same for every seed, cut into parts."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split(list(PARTS.values()))
    return {name: TensorDataset(images[part], labels[part]) for name, part in zip(PARTS, parts, strict=True)}


def make_model() -> ComposerClassifier:
    """Two convolutions with BatchNorm, and a linear layer, for images of 8 x 8."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 4 * 4, 10),
    )
    return ComposerClassifier(layers, num_classes=10)


def make_trainer(rate: float, seed: int, steps: int, train: TensorDataset, **arguments: Any) -> Trainer:
    """A run at a constant rate."""
    reproducibility.seed_all(seed)
    model = make_model()
    order = torch.Generator().manual_seed(seed)
    return Trainer(
        model=model,
        train_dataloader=DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order),
        optimizers=torch.optim.SGD(model.parameters(), rate, MOMENTUM),
        max_duration=f'{steps}ba',
        seed=seed,
        device='cpu',
        progress_bar=False,
        **arguments,
    )


def try_settings(rate: float, seed: int, steps: int, parts: Mapping[str, TensorDataset]) -> dict[str, list[Record]]:
    """The validation losses of every setting at the last step of one run, by what becomes of the statistics."""
    with tempfile.TemporaryDirectory() as folder:
        saving = {'save_folder': folder, 'save_interval': f'{INTERVAL}ba', 'save_latest_filename': None}
        trainer = make_trainer(rate, seed, steps, parts['train'], **saving)
        # The weights before the first step, from which averages start.
        trainer.save_checkpoint(f'{folder}/ep0-ba0-rank0.pt')
        trainer.fit()
        trainer.close()
        model = trainer.state.model.eval()

        def evaluate(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
            model.load_state_dict(weights)
            return {'loss': measure(model.module, parts['validation'])['loss']}

        results = {}
        for name, copied in STATISTICS.items():
            trajectory = Trajectory(folder, copy=copied)
            averages = [
                average for grid in GRIDS for setting in expand_grid(grid) for average in trajectory.plan(setting)
            ]
            results[name] = [
                {**as_row(result.average.setting), 'step': steps, **result.losses}
                for result in evaluate_averages(trajectory, averages, evaluate)
            ]
        return results


def tune(rate: float, steps: int, parts: Mapping[str, TensorDataset]) -> dict[Case, list[Record]]:
    """The validation loss of every setting at the last step, the mean over the seeds for choosing."""
    runs = [try_settings(rate, seed, steps, parts) for seed in TUNING_SEEDS]
    return {
        Case(rate, statistics): [
            {**rows[0], **mean_record(rows, ['loss'])} for rows in zip(*(run[statistics] for run in runs), strict=True)
        ]
        for statistics in STATISTICS
    }


def as_row(setting: Setting) -> Record:
    """A setting as the lines of a sweep have it."""
    return {'rule': setting.rule, **setting.given}


@torch.inference_mode()
def measure(layers: torch.nn.Module, data: TensorDataset) -> dict[str, float]:
    """The loss and the accuracy of layers that are in evaluation mode."""
    images, labels = data.tensors
    logits = layers(images)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return {'loss': loss, 'accuracy': (logits.argmax(dim=1) == labels).float().mean().item()}


def make_algorithms(settings: Settings, average_buffers: bool) -> dict[str, EMA | BEMA]:
    """An EMA and a BEMA, each with an evaluator of its own."""
    classes = {'ema': EMA, 'bema': BEMA}
    return {method: build(classes[method], settings[method], average_buffers) for method in classes}


def build(average: type[EMA] | type[BEMA], setting: Record, average_buffers: bool) -> EMA | BEMA:
    """An algorithm of a setting of a sweep."""
    options = {name: value for name, value in setting.items() if name != 'rule'}
    if 'half_life' in options:
        options['half_life'] = f'{options["half_life"]}ba'
    return average(
        **options,
        update_freq=f'{INTERVAL}ba',
        eval_labels=[setting['rule']],
        save_weights='training',
        average_buffers=average_buffers,
    )


def report_seed(
    case: Case, seed: int, steps: int, settings: Settings, parts: Mapping[str, TensorDataset]
) -> tuple[list[Record], list[Record]]:
    """One run: the test loss and accuracy of each method along the way, and at its end with recomputed statistics."""
    algorithms = make_algorithms(settings, average_buffers=case.statistics == 'averaged')
    test = DataLoader(parts['test'], len(parts['test']))
    logger = InMemoryLogger()
    trainer = make_trainer(
        case.rate,
        seed,
        steps,
        parts['train'],
        algorithms=list(algorithms.values()),
        eval_dataloader=[Evaluator(label=method, dataloader=test) for method in METHODS],
        eval_interval=f'{EVALUATE_EVERY}ba',
        loggers=logger,
    )
    trainer.fit()
    trainer.close()
    keys = {**case._asdict(), 'seed': seed}
    along = [{**keys, **record} for record in logged(logger)]
    recomputed = [
        {**keys, 'method': method, **with_recomputed_statistics(algorithm, trainer.state.model, parts)}
        for method, algorithm in algorithms.items()
    ]
    return along, recomputed


def logged(logger: InMemoryLogger) -> list[Record]:
    """What a run has logged: a record for each measure and step."""
    records: dict[tuple[str, int], Record] = {}
    for (measure_name, metric), method in itertools.product(METRICS.items(), METHODS):
        for timestamp, value in logger.data[f'metrics/{method}/{metric}']:
            step = timestamp.batch.value
            record = records.setdefault((measure_name, step), {'measure': measure_name, 'step': step})
            record[method] = float(value)
    return [{**record, 'ema - bema': record['ema'] - record['bema']} for record in records.values()]


def with_recomputed_statistics(
    algorithm: EMA | BEMA, model: torch.nn.Module, parts: Mapping[str, TensorDataset]
) -> dict[str, float]:
    """Test loss and accuracy of an average whose statistics are those of its own activations on the training images."""
    layers = copy.deepcopy(algorithm.get_averaged_model(model).module)
    algorithm.get_training_model(model)
    train = parts['train']
    update_bn(DataLoader(train, len(train)), layers)
    return measure(layers.eval(), parts['test'])


def report(records: Sequence[Record], recomputed: Sequence[Record], chosen: Mapping[Case, Settings], steps: int) -> str:
    """The tables, as a page."""
    parts = []
    for case, settings in chosen.items():
        own = select(records, **case._asdict())
        parts += [f'## {case}', f'Chosen: {"; ".join(map(describe, settings.values()))}.']
        for name in METRICS:
            last = select(own, measure=name, step=steps)
            parts += [f'Test {name} at step {steps}:', table_of_seeds(last, [*METHODS, 'ema - bema'])]
        parts += ['The first step at or below the best loss of the EMA:', table_of_steps(select(own, measure='loss'))]
    parts += ['## Statistics recomputed', f'The averages at step {steps}, with those of their own activations:']
    rows = [row for case in chosen for row in comparison(case, records, recomputed, steps)]
    return '\n\n'.join([*(part.rstrip('\n') for part in parts), markdown(rows)])


def comparison(case: Case, records: Sequence[Record], recomputed: Sequence[Record], steps: int) -> list[Record]:
    """The mean loss and accuracy over seeds of each average under its own statistics and under recomputed ones."""
    rows = []
    for method in ('ema', 'bema'):
        anew = select(recomputed, **case._asdict(), method=method)
        row: Record = {'rate': f'{case.rate:g}', 'statistics': case.statistics, 'average': TITLES[method]}
        for name in METRICS:
            last = select(records, **case._asdict(), measure=name, step=steps)
            row[name] = mean_record(last, [method])[method]
            row[f'{name}, recomputed'] = mean_record(anew, [name])[name]
        rows.append(row)
    return rows


def draw(records: Sequence[Record], cases: Sequence[Case], steps: int, path: Path) -> None:
    """Draw loss and accuracy over the steps, a column for each case."""
    # The beginning would leave no room for what differs.
    records = [record for record in records if record['step'] >= steps / 4 and record['step'] % DRAW_EVERY == 0]
    labels = {'loss': 'test loss (nats)', 'accuracy': 'test accuracy'}
    rows = []
    for name, label in labels.items():
        panels = []
        for case in cases:
            own = select(records, **case._asdict(), measure=name)
            curves = {TITLES[method]: curve_over_seeds(own, method) for method in METHODS}
            panels.append(Panel(curves, label, str(case) if name == 'loss' else ''))
        rows.append(panels)
    plot_panels(rows, path, 'optimizer step')


@click.command(context_settings={'help_option_names': ['-h', '--help']})
@click.option('--steps', default=STEPS, show_default=True, help='Of each run; a multiple of 10.')
@click.option('--seeds', default='1,2,3,4,5', show_default=True, callback=parse_seeds, help='The seeds to report.')
def main(steps: int, seeds: list[int]) -> None:
    """Choose settings on validation images, and report them on test images with other seeds."""
    if set(TUNING_SEEDS) & set(seeds):
        raise click.UsageError('A seed that settings are chosen with cannot be reported.')
    if steps < EVALUATE_EVERY or steps % EVALUATE_EVERY:
        raise click.UsageError(f'--steps must be a multiple of {EVALUATE_EVERY}, and is {steps}.')
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', module='composer')
    parts = load_parts()
    tuned: dict[Case, list[Record]] = {}
    for rate in LEARNING_RATES:
        tuned |= tune(rate, steps, parts)
    chosen = {case: best_settings(rows, steps, 'loss') for case, rows in tuned.items()}
    records, recomputed = [], []
    for case, seed in itertools.product(chosen, seeds):
        along, anew = report_seed(case, seed, steps, chosen[case], parts)
        records += along
        recomputed += anew
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    write_lines(OUT / 'tuning.jsonl', ({**case._asdict(), **row} for case, rows in tuned.items() for row in rows))
    write_lines(OUT / 'results.jsonl', records)
    write_lines(OUT / 'recomputed.jsonl', recomputed)
    page = report(records, recomputed, chosen, steps)
    (OUT / 'tables.md').write_text(page, encoding='utf-8')
    draw(records, list(chosen), steps, OUT / 'curves.png')
    click.echo(page)
    click.echo(f'All of it: {OUT}')


if __name__ == '__main__':
    main()
