# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tokens a second of training without an average, with Composer's EMA, and with BEMA.

    python benchmarks/training.py                       the quickstart's model and one of 25M parameters, on the CPU

Run it from the repository's root. It prints the tables of docs/performance.md. The runs are the quickstart's (see
yamls/quickstart.yaml) without evaluations and checkpoints. They take turns, some steps each, so that what else the
machine does is shared out, and each turn is compared with that of the run without an average in the same round. A
turn's time is that from its first batch to the end of its last step. BEMA checks the weights for NaNs, as it does by
default.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

# Before torch is imported, as `composer-bema train` does.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from composer import Algorithm, Trainer
from composer.algorithms import EMA as ComposerEMA
from composer.core import Callback, State
from composer.loggers import Logger
from measuring import Row, markdown, median_ratio, num_parameters, quartiles, save

from composer_bema.training.config import load_config
from composer_bema.training.run import build_trainer

YAML = 'yamls/quickstart.yaml'
TRIMMED = ['progress_bar=false', 'log_to_console=false', 'train_loader.dataset.shuffle_seed=17']

NONE = 'none'
# The algorithms of a YAML, but for Composer's, which a YAML cannot name.
AVERAGES: dict[str, dict[str, Any]] = {
    NONE: {},
    'Composer EMA at 1ba': {},
    'BEMA at 1ba': {'bema': {'update_freq': '1ba'}},
    'BEMA at 10ba': {'bema': {'update_freq': '10ba'}},
}


class Case(NamedTuple):
    """A model, and how it is trained."""

    batch_size: int
    """Sequences a step, of 128 tokens."""
    steps: int
    """Of a turn; a multiple of 10, so that every turn has as many updates."""
    config: dict[str, Any] | None
    """The model in place of the quickstart's."""


LLAMA_25M = {
    'model_type': 'llama',
    'hidden_size': 512,
    'intermediate_size': 1376,
    'num_hidden_layers': 8,
    'num_attention_heads': 8,
    'max_position_embeddings': 256,
    'tie_word_embeddings': True,
}
CASES = {'quickstart': Case(1, 50, None), '25m': Case(8, 10, LLAMA_25M)}


class Stopwatch(Callback):
    """Takes the seconds from the first batch of a fit to the end of its last step.

    Algorithms come before callbacks at BATCH_END, so that an update is part of it. A callback that had something to do
    at BATCH_CHECKPOINT would be taken for one that saves, and get the average into the model at every step.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start: float | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._start = None

    def before_train_batch(self, state: State, logger: Logger) -> None:
        del state, logger
        if self._start is None:
            self._start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        del state, logger
        assert self._start is not None, 'a step has begun'
        self.seconds = time.perf_counter() - self._start


class Run(NamedTuple):
    """A run that goes on by turns."""

    trainer: Trainer
    stopwatch: Stopwatch

    def take_turn(self, steps: int) -> float:
        """The seconds that so many more steps take."""
        self.trainer.fit(duration=f'{steps}ba')
        return self.stopwatch.seconds


@contextmanager
def run(case: Case, average: str) -> Iterator[Run]:
    """The quickstart, or the same with another model, with one of ``AVERAGES``."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(YAML, [*TRIMMED, f'run_folder={folder}', f'global_train_batch_size={case.batch_size}'])
        clipping = {'gradient_clipping': (config.algorithms or {})['gradient_clipping']}
        changes: dict[str, Any] = {'algorithms': {**clipping, **AVERAGES[average]}}
        if case.config is not None:
            changes['model'] = {'name': 'hf_causal_lm', 'config': case.config, 'use_train_metrics': False}
        trainer = build_trainer(dataclasses.replace(config, eval_loader=None, save_folder=None, **changes))
        stopwatch = Stopwatch()
        trainer.state.callbacks.append(stopwatch)
        trainer.state.algorithms += composers(average)
        try:
            yield Run(trainer, stopwatch)
        finally:
            trainer.close()


def composers(average: str) -> list[Algorithm]:
    """Composer's EMA, if that is the average."""
    return [ComposerEMA(half_life='1000ba', update_interval='1ba')] if average == 'Composer EMA at 1ba' else []


def measure(name: str, rounds: int) -> dict[str, Any]:
    """The tokens a second of every turn, by average."""
    case = CASES[name]
    with ExitStack() as stack:
        runs = {average: stack.enter_context(run(case, average)) for average in AVERAGES}
        size = num_parameters(runs[NONE].trainer.state.model)
        speeds: dict[str, list[float]] = {average: [] for average in runs}
        for number in range(1 + rounds):
            # In one order and then in the other, so that nobody is always first.
            for average, its_run in list(runs.items())[:: 1 if number % 2 else -1]:
                taken = its_run.take_turn(case.steps)
                if number:
                    speeds[average].append(case.steps * case.batch_size * 128 / taken)
            print(f'{name}: round {number} of {rounds}', file=sys.stderr)
    return {'parameters': size, 'tokens a step': 128 * case.batch_size, 'steps a turn': case.steps, 'speeds': speeds}


def table(result: dict[str, Any]) -> str:
    """A row an average: tokens a second, and the ratio to the run without one in the same round, with its quartiles."""
    speeds = result['speeds']
    rows: list[Row] = []
    for average, own in speeds.items():
        lower, upper = quartiles([mine / none for mine, none in zip(own, speeds[NONE], strict=True)])
        rows.append(
            {
                'average': average,
                'tokens a second': f'{statistics.median(own):.0f}',
                'of none': f'{median_ratio(own, speeds[NONE]):.3f}',
                'quartiles': f'{lower:.3f} to {upper:.3f}',
            }
        )
    return markdown(rows)


@click.command(context_settings={'show_default': True})
@click.option('--model', 'models', type=click.Choice(list(CASES)), multiple=True, default=list(CASES))
@click.option('--rounds', type=click.IntRange(1), default=7, help='After one that does not count.')
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='runs/benchmarks')
def main(models: tuple[str, ...], rounds: int, out: Path) -> None:
    """Measure the speed of training, and print a table for each model."""
    for name in models:
        result = measure(name, rounds)
        size, tokens = result['parameters'] / 1e6, result['tokens a step']
        turns = f'medians of {rounds} turns of {result["steps a turn"]} steps'
        title = f'{name}: {size:.1f}M parameters, {tokens} tokens a step, {turns}'
        save(out, f'training-{name}', f'{title}\n\n{table(result)}', {'title': title, **result})


if __name__ == '__main__':
    main()
