# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A language model that moves to another text: its training weights, EMA and BEMA, over five seeds and three noises.

    python benchmarks/evidence_language_model.py
    python benchmarks/evidence_language_model.py --regime noisy --seeds 1,2 --steps 100

Run it from the repository's root; its tables and its picture go to runs/evidence/language-model. Each run is
yamls/quickstart.yaml at a constant rate, trained once; its averages are computed from its checkpoints by
`composer-bema sweep`. The settings are chosen with a seed and a text of their own, EMA and BEMA each among as many, and
reported on other seeds and on another text. Two processes share the work.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch is loaded.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import click
import torch
from over_seeds import (
    METHODS,
    TITLES,
    Record,
    best_settings,
    curve_over_seeds,
    describe,
    parse_seeds,
    read_lines,
    select,
    table_of_seeds,
    table_of_steps,
    write_lines,
)

from composer_bema.plots import Panel, plot_panels
from composer_bema.training.config import load_config
from composer_bema.training.data.python_manual import manual_topics
from composer_bema.training.run import train
from composer_bema.training.sweep import run_sweep

YAML = 'yamls/quickstart.yaml'
SWEEP = 'yamls/sweeps/evidence_language_model.yaml'
OUT = Path('runs/evidence/language-model')
TEXT = OUT / 'text'

STEPS = 200
INTERVAL = 5  # steps from one checkpoint to the next
# Settings are also chosen for shorter runs, whose averages have less to average.
PARTS_OF_THE_RUN = (1 / 4, 1 / 2, 1)
TUNING_SEED = 0
PROCESSES = 2

# The text is dealt out in pieces: one in twenty is for choosing, one in twenty for reporting.
PIECE = 1024  # characters
TURNS = 20
DEALT = {'validation': 4, 'test': 14}

TRAINING_WEIGHTS = {'rule': 'lawa', 'window': 1}
METHOD_OF = {'lawa': 'training', 'ema': 'ema', 'bema': 'bema'}

Settings = dict[str, Record]
"""A setting by its rule."""


class Regime(NamedTuple):
    """What sets the noise of a step."""

    batch_size: int
    """Sequences of 128 bytes."""
    learning_rate: float

    def __str__(self) -> str:
        return f'batch {self.batch_size}, rate {self.learning_rate:g}'


# The quickstart's, and a quarter of its noise in two ways.
REGIMES = {'noisy': Regime(1, 1e-3), 'lower-rate': Regime(1, 2.5e-4), 'larger-batch': Regime(4, 1e-3)}


class Job(NamedTuple):
    """A run, and the averages that its checkpoints are to be evaluated under."""

    regime: str
    seed: int
    steps: int
    sweeps: Sequence[Sequence[str]]
    """The overrides of each sweep."""

    @property
    def folder(self) -> Path:
        """Where the run's sweeps go."""
        return OUT / f'{self.regime}-seed{self.seed}'


def write_text() -> None:
    """Deal the second half of the manual out to training, choosing and reporting."""
    text = '\n\n'.join(manual_topics('second_half'))
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    parts: dict[str, list[Mapping[str, str]]] = {'train': [], **{part: [] for part in DEALT}}
    for index, piece in enumerate(pieces):
        part = next((name for name, place in DEALT.items() if index % TURNS == place), 'train')
        parts[part].append({'text': piece})
    TEXT.mkdir(parents=True)
    for name, rows in parts.items():
        write_lines(TEXT / f'{name}.jsonl', rows)


def run(job: Job) -> list[list[Record]]:
    """Train, and return the losses of each sweep over the checkpoints, which are removed."""
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    # The bars of two processes on one line help nobody.
    with contextlib.redirect_stderr(io.StringIO()):
        checkpoints = train_run(job)
        results = []
        for number, overrides in enumerate(job.sweeps):
            out = job.folder / f'sweep-{number}'
            run_sweep(checkpoints, SWEEP, out, overrides)
            results.append(read_lines(out / 'results.jsonl'))
    shutil.rmtree(checkpoints)
    return results


def train_run(job: Job) -> Path:
    """Train one run, without averages and evaluations; return the folder of its checkpoints."""
    batch_size, learning_rate = REGIMES[job.regime]
    data = {'paths': str(TEXT / 'train.jsonl'), 'part': 'all', 'shuffle': True, 'shuffle_seed': job.seed}
    clipping = {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}}
    overrides = {
        'run_folder': str(job.folder / 'run'),
        'seed': job.seed,
        'max_duration': f'{job.steps}ba',
        'global_train_batch_size': batch_size,
        'optimizer.lr': learning_rate,
        'train_loader.name': 'text_files',
        'train_loader.dataset': data,
        'algorithms': clipping,
        'eval_loader': None,
        'save_interval': f'{INTERVAL}ba',
        'progress_bar': False,
    }
    train(load_config(YAML, [f'{name}={json.dumps(value)}' for name, value in overrides.items()]))
    return job.folder / 'run' / 'checkpoints'


def sweep_over(settings: Iterable[Mapping[str, Any]], steps: Sequence[int]) -> list[str]:
    """The overrides of a sweep that evaluates settings on the test text."""
    text = TEXT / 'test.jsonl'
    return [
        f'averages={json.dumps(list(settings))}',
        f'at={list(steps)}',
        f'evaluate.eval_loader.0.dataset.paths={text}',
    ]


def tuning_job(regime: str, steps: int, overrides: Sequence[str]) -> Job:
    """All settings at each length, on the validation text."""
    return Job(regime, TUNING_SEED, steps, [[f'at={lengths(steps)}', *overrides]])


def reporting_job(regime: str, seed: int, steps: int, chosen: Mapping[int, Settings], overrides: Sequence[str]) -> Job:
    """The settings chosen for the last step along the run, and those for shorter runs at their own."""
    along = sweep_over([TRAINING_WEIGHTS, *chosen[steps].values()], range(INTERVAL, steps + 1, INTERVAL))
    shorter = [setting for length, settings in chosen.items() if length < steps for setting in settings.values()]
    distinct = [setting for number, setting in enumerate(shorter) if setting not in shorter[:number]]
    early = sweep_over(distinct, [length for length in chosen if length < steps])
    return Job(regime, seed, steps, [[*overrides, *along], [*overrides, *early]])


def lengths(steps: int) -> list[int]:
    """The lengths of training that settings are chosen for."""
    return [round(part * steps / INTERVAL) * INTERVAL for part in PARTS_OF_THE_RUN]


def records_along(job: Job, rows: Iterable[Record]) -> list[Record]:
    """A record for each step of a run, from the lines of a sweep."""
    by_step: dict[int, Record] = {}
    for row in rows:
        record = by_step.setdefault(row['step'], {'regime': job.regime, 'seed': job.seed, 'step': row['step']})
        record[METHOD_OF[row['rule']]] = row['loss']
    return [with_gain(record) for record in by_step.values()]


def records_at_lengths(job: Job, rows: Sequence[Record], chosen: Mapping[int, Settings]) -> list[Record]:
    """A record for each shorter length, under the settings that were chosen for it."""
    records = []
    for length in (length for length in chosen if length < job.steps):
        settings = chosen[length].values()
        # The sweep has each setting at each length.
        own = [
            row for row in rows if row['step'] == length and any(setting.items() <= row.items() for setting in settings)
        ]
        records += records_along(job, own)
    return records


def with_gain(record: Record) -> Record:
    """Add by how much BEMA is below the EMA."""
    return {**record, 'ema - bema': record['ema'] - record['bema']}


def report(records: Sequence[Record], early: Sequence[Record], chosen: Mapping[str, Mapping[int, Settings]]) -> str:
    """The tables, as a page."""
    parts = []
    for regime, by_length in chosen.items():
        own, last = select(records, regime=regime), max(by_length)
        settings = '; '.join(f'{length}: {", ".join(map(describe, s.values()))}' for length, s in by_length.items())
        parts += [f'## {regime} ({REGIMES[regime]})', f'Chosen, for a run of so many steps: {settings}.']
        parts += [
            f'Loss at step {last}, in nats a byte:',
            table_of_seeds(select(own, step=last), [*METHODS, 'ema - bema']),
        ]
        parts += ['The first step at or below the best loss of the EMA:', table_of_steps(own)]
        for length in (length for length in by_length if length < last):
            shorter = select(early, regime=regime, step=length)
            parts += [
                f'Chosen for {length} steps, at step {length}:',
                table_of_seeds(shorter, ['ema', 'bema', 'ema - bema']),
            ]
    return '\n\n'.join(part.rstrip('\n') for part in parts) + '\n'


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw the losses of each regime over the steps, and below them what BEMA gains on the EMA."""
    regimes = list(dict.fromkeys(record['regime'] for record in records))
    losses, gains = [], []
    for regime in regimes:
        own = select(records, regime=regime)
        curves = {TITLES[method]: curve_over_seeds(own, method) for method in METHODS}
        losses.append(Panel(curves, 'test loss (nats per byte)', str(REGIMES[regime])))
        gains.append(Panel({'EMA - BEMA': curve_over_seeds(own, 'ema - bema')}, 'difference (nats per byte)', level=0))
    plot_panels([losses, gains], path, 'optimizer step')


@click.command(context_settings={'help_option_names': ['-h', '--help']})
@click.argument('overrides', nargs=-1, metavar='[KEY=VALUE]...')
@click.option('--steps', default=STEPS, show_default=True, help='Of each run; a multiple of 20.')
@click.option('--seeds', default='1,2,3,4,5', show_default=True, callback=parse_seeds, help='The seeds to report.')
@click.option(
    '--regime', 'regimes', multiple=True, type=click.Choice(list(REGIMES)), help='Repeatable.  [default: all]'
)
def main(overrides: tuple[str, ...], steps: int, seeds: list[int], regimes: tuple[str, ...]) -> None:
    """Choose settings, report them on other seeds and text; KEY=VALUE overrides the sweep's YAML."""
    if TUNING_SEED in seeds:
        raise click.UsageError(f'Settings are chosen with seed {TUNING_SEED}, which cannot be reported.')
    if steps < 20 or steps % 20:
        raise click.UsageError(f'--steps must be a multiple of 20, and is {steps}.')
    shutil.rmtree(OUT, ignore_errors=True)
    write_text()
    names = regimes or tuple(REGIMES)
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context('spawn')) as pool:
        tuning = [tuning_job(name, steps, overrides) for name in names]
        tuned = {job.regime: rows for job, (rows,) in zip(tuning, pool.map(run, tuning), strict=True)}
        chosen = {
            name: {length: best_settings(rows, length, 'loss') for length in lengths(steps)}
            for name, rows in tuned.items()
        }
        jobs = [
            reporting_job(name, seed, steps, chosen[name], overrides) for name, seed in itertools.product(names, seeds)
        ]
        records, early = [], []
        for job, (along, at_lengths) in zip(jobs, pool.map(run, jobs), strict=True):
            records += records_along(job, along)
            early += records_at_lengths(job, at_lengths, chosen[job.regime])
    write_lines(OUT / 'tuning.jsonl', ({'regime': name, **row} for name, rows in tuned.items() for row in rows))
    write_lines(OUT / 'results.jsonl', records)
    write_lines(OUT / 'shorter.jsonl', early)
    page = report(records, early, chosen)
    (OUT / 'tables.md').write_text(page, encoding='utf-8')
    draw(records, OUT / 'losses.png')
    click.echo(page)
    click.echo(f'All of it: {OUT}')


if __name__ == '__main__':
    main()
