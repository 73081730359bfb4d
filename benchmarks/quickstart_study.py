# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Whether BEMA beats a tuned EMA in the quickstart: tuned on one seed, reported on other seeds and other text.

    python benchmarks/quickstart_study.py
    python benchmarks/quickstart_study.py --seeds 6,7 --out runs/longer.json max_duration=400ba

Run it from the repository's root; about five minutes on two cores. Every run is yamls/quickstart.yaml with another
seed, trained once by the package: snapshots of its weights are then averaged under every setting, which costs no
training. The settings are tuned on the even held-out blocks and reported on the odd ones, within two families: rates
that decay as a power of the step, and constant rates (a half-life). In each, EMA and BEMA get eighteen settings.
"""

import dataclasses
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from over_seeds import Record, markdown, mean_record, parse_seeds, standard_error

from composer_bema import functional as cf
from composer_bema.training.config import TrainConfig, load_config
from composer_bema.training.data.sections import build_loader, eval_sections
from composer_bema.training.run import build_trainer
from composer_bema.training.tokenizers import build_tokenizer

YAML = 'yamls/quickstart.yaml'
REPORT_EVERY = 25  # steps

TUNING_BLOCKS = slice(0, None, 2)
REPORTING_BLOCKS = slice(1, None, 2)

COLUMNS = ('training', 'ema', 'bema', 'ema - bema')

Weights = dict[str, torch.Tensor]
BlockLosses = torch.Tensor
"""Mean loss of each held-out block, in nats a token."""


class Setting(NamedTuple):
    """An average, with the names that the YAML gives its settings: the powers are kappa and eta, ``lag`` is rho."""

    method: str
    ema_power: float | None = None
    bias_power: float | None = None
    lag: float | None = None
    half_life: float | None = None

    def arguments(self) -> dict[str, float]:
        """What stands under the method's name in the YAML, but for the frequency of updates; a half-life in steps."""
        return {name: value for name, value in self._asdict().items() if name != 'method' and value is not None}

    def start(self, model: torch.nn.Module, update_freq: int) -> cf.LoopState:
        """The average before the first step, taken from the weights in ``model``."""
        init = {'ema': cf.init_ema, 'bema': cf.init_bema}[self.method]
        return init(model, update_freq=update_freq, **self.arguments())

    def __str__(self) -> str:
        return f'{self.method} ({", ".join(f"{name} {value:g}" for name, value in self.arguments().items())})'


KAPPAS = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
HALF_LIVES = (25, 50, 75, 100, 110, 125, 140, 150, 160, 175, 200, 225, 250, 300, 350, 400, 500, 600)

# Eighteen settings a method in each family; what BEMA spends on eta, the EMA spends on a finer grid of its own.
FAMILIES = {
    'power': [
        *(Setting('ema', kappa, lag=rho) for kappa, rho in itertools.product(KAPPAS, (1, 10))),
        *(
            Setting('bema', kappa, eta, lag=10)
            for kappa, eta in itertools.product((0.5, 0.7, 0.8, 0.9, 1.0, 1.1), (0.2, 0.4, 0.6))
        ),
    ],
    'constant': [
        *(Setting('ema', half_life=steps) for steps in HALF_LIVES),
        *(
            Setting('bema', bias_power=eta, half_life=steps)
            for steps, eta in itertools.product((100, 150, 200, 250, 300, 400), (0.4, 0.6, 0.8))
        ),
    ],
}
# Not tuned: the paper's BEMA, and the EMA inside it.
DEFAULTS = {'ema': Setting('ema', 0.5, lag=10), 'bema': Setting('bema', 0.5, 0.2, lag=10)}


Pairs = dict[str, dict[str, Setting]]
"""An EMA and a BEMA to compare, by the family that they come from."""


class Snapshots(Callback):
    """Keeps a copy of the weights every ``update_freq`` optimizer steps, and of those before the first."""

    def __init__(self, update_freq: int) -> None:
        self.update_freq = update_freq
        self.weights: dict[int, Weights] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        self._keep(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if state.timestamp.batch.value % self.update_freq == 0:
            self._keep(state)

    def _keep(self, state: State) -> None:
        copies = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        self.weights[state.timestamp.batch.value] = copies


class Run(NamedTuple):
    """One seed's trajectory, and the text to judge its averages by."""

    model: torch.nn.Module
    snapshots: dict[int, Weights]
    update_freq: int
    held_out: torch.Tensor
    """Shape (blocks, tokens)."""


def train_quickstart(seed: int, overrides: Sequence[str]) -> Run:
    """Train the quickstart from another seed, without the averages, the evaluations and the checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = (f'seed={seed}', f'train_loader.dataset.shuffle_seed={seed}')
        config = load_config(YAML, [*overrides, *seeds, f'run_folder={folder}', 'progress_bar=false'])
        algorithms = dict(config.algorithms or {})
        _, update_freq = algorithms.pop('ema'), algorithms.pop('bema')['update_freq']
        callback = Snapshots(Time.from_input(update_freq, 'ba').value)
        plain = dataclasses.replace(config, algorithms=algorithms, eval_loader=None, save_folder=None)
        trainer = build_trainer(plain)
        trainer.state.callbacks.append(callback)
        try:
            trainer.fit()
        finally:
            trainer.close()
    return Run(trainer.state.model.eval(), callback.weights, callback.update_freq, held_out_blocks(config))


def held_out_blocks(config: TrainConfig) -> torch.Tensor:
    """The text that the quickstart's evaluators share."""
    path, section = next(iter(eval_sections(config.eval_loader).values()))
    loader = build_loader(section, path, build_tokenizer(config.tokenizer), config.max_seq_len, batch_size=1)
    return torch.cat([batch['input_ids'] for batch in loader.dataloader])


def evaluate(
    run: Run, settings: Iterable[Setting], steps: Collection[int], blocks: slice
) -> dict[str, dict[int, BlockLosses]]:
    """The losses of the training weights and of each average, by name and step."""
    tokens = run.held_out[blocks]
    run.model.load_state_dict(run.snapshots[0])
    averages = {str(setting): setting.start(run.model, run.update_freq) for setting in settings}
    losses: dict[str, dict[int, BlockLosses]] = {name: {} for name in ('training', *averages)}
    for step, weights in sorted(run.snapshots.items()):
        run.model.load_state_dict(weights)
        if step > 0:
            for average in averages.values():
                average.update(run.model, step, elapsed=run.update_freq)
        if step in steps:
            losses['training'][step] = block_losses(run.model, tokens)
            for name, average in averages.items():
                with average.applied_to(run.model):
                    losses[name][step] = block_losses(run.model, tokens)
    return losses


@torch.inference_mode()
def block_losses(model: torch.nn.Module, tokens: torch.Tensor) -> BlockLosses:
    """The mean loss of each block under the weights in ``model``."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model({'input_ids': tokens}).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), tokens[:, 1:], reduction='none')
    return losses.mean(dim=1).cpu()


def tune(seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, dict[str, list[tuple[float, Setting]]]]:
    """The loss of every setting at the last step, the mean over ``seeds``; by family and method, best first."""
    everything = list(itertools.chain.from_iterable(FAMILIES.values()))
    scores = dict.fromkeys(everything, 0.0)
    for seed in seeds:
        run = train_quickstart(seed, overrides)
        last = max(run.snapshots)
        losses = evaluate(run, everything, [last], TUNING_BLOCKS)
        for setting in everything:
            scores[setting] += losses[str(setting)][last].mean().item() / len(seeds)
    return {
        family: {
            method: sorted(((scores[s], s) for s in settings if s.method == method), key=lambda row: row[0])
            for method in ('ema', 'bema')
        }
        for family, settings in FAMILIES.items()
    }


def report(seed: int, pairs: Pairs, overrides: Sequence[str]) -> list[Record]:
    """One seed's losses along the way: a record for each pair and step, with a standard error over blocks."""
    run = train_quickstart(seed, overrides)
    steps = [step for step in sorted(run.snapshots) if step % REPORT_EVERY == 0]
    settings = [setting for pair in pairs.values() for setting in pair.values()]
    losses = evaluate(run, settings, steps, REPORTING_BLOCKS)
    records = []
    for (name, pair), step in itertools.product(pairs.items(), steps):
        ema, bema = (losses[str(pair[method])][step] for method in ('ema', 'bema'))
        means = {'training': losses['training'][step], 'ema': ema, 'bema': bema, 'ema - bema': ema - bema}
        record: Record = {'pair': name, 'seed': seed, 'step': step}
        record |= {column: values.mean().item() for column, values in means.items()}
        records.append(record | {'SE': standard_error((ema - bema).tolist())})
    return records


def mean_of(records: Sequence[Record]) -> Record:
    """The mean over seeds, with the standard error between them (not a number for one seed)."""
    gains = [record['ema - bema'] for record in records]
    return {'seed': 'mean', 'step': records[0]['step'], **mean_record(records, COLUMNS), 'SE': standard_error(gains)}


def show(records: Sequence[Record], columns: Sequence[str] = ()) -> None:
    """Print records as a Markdown table."""
    click.echo(markdown(records, columns) + '\n')


def show_tuning(ranked: dict[str, dict[str, list[tuple[float, Setting]]]]) -> None:
    """Print the settings tried, best first."""
    for family, methods in ranked.items():
        for method, rows in methods.items():
            click.echo(f'{method}, {family} rates: {len(rows)} settings, even held-out blocks, last step\n')
            show([{**{n: f'{v:g}' for n, v in s.arguments().items()}, 'loss': score} for score, s in rows])


def show_report(pair: dict[str, Setting], records: Sequence[Record]) -> int:
    """Print the tables of one pair; return on how many seeds the order bema < ema < training holds at the last step."""
    last = max(record['step'] for record in records)
    final = [record for record in records if record['step'] == last]
    click.echo(f'{pair["ema"]} and {pair["bema"]} at step {last}, odd held-out blocks;')
    click.echo('SE is that of ema - bema over blocks, in the last row over seeds\n')
    show([*final, mean_of(final)], ['seed', *COLUMNS, 'SE'])
    click.echo('The mean over seeds, and the first of them, along the way\n')
    by_step = itertools.groupby(sorted(records, key=lambda record: record['step']), key=lambda record: record['step'])
    show([mean_of(list(group)) for _, group in by_step], ['step', *COLUMNS, 'SE'])
    show([record for record in records if record['seed'] == records[0]['seed']], ['step', *COLUMNS, 'SE'])
    holds = sum(r['bema'] < r['ema'] < r['training'] for r in final)
    click.echo(f'bema < ema < training at step {last} on {holds} of {len(final)} seeds.\n')
    return holds


@click.command(context_settings={'help_option_names': ['-h', '--help']})
@click.argument('overrides', nargs=-1, metavar='[KEY=VALUE]...')
@click.option('--tuning-seed', 'tuning_seeds', default='0', callback=parse_seeds, help='One or several.')
@click.option('--seeds', default='1,2,3,4,5', callback=parse_seeds, help='The seeds to report.')
@click.option('--out', default='runs/quickstart_study.json', type=click.Path(dir_okay=False, path_type=Path))
def main(overrides: tuple[str, ...], tuning_seeds: list[int], seeds: list[int], out: Path) -> None:
    """Tune EMA and BEMA in the quickstart, report both on other seeds and text; KEY=VALUE overrides its settings."""
    if set(tuning_seeds) & set(seeds):
        raise click.UsageError('A seed that settings were tuned on cannot be reported.')
    # One thread: the order of additions, and so the last digit, shall not depend on the number of cores.
    torch.set_num_threads(1)
    logging.getLogger('composer').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='composer')

    ranked = tune(tuning_seeds, overrides)
    show_tuning(ranked)
    pairs: Pairs = {
        family: {method: rows[0][1] for method, rows in methods.items()} for family, methods in ranked.items()
    } | {'defaults': DEFAULTS}
    records = [record for seed in seeds for record in report(seed, pairs, overrides)]
    holds = {name: show_report(pair, [r for r in records if r['pair'] == name]) for name, pair in pairs.items()}

    results = {
        'overrides': overrides,
        'tuning_seeds': tuning_seeds,
        'tuning': [
            {'family': family, 'method': method, **setting.arguments(), 'loss': score}
            for family, methods in ranked.items()
            for method, rows in methods.items()
            for score, setting in rows
        ],
        'pairs': {name: {method: s.arguments() for method, s in pair.items()} for name, pair in pairs.items()},
        'records': records,
        'order_holds': holds,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    click.echo(f'All of it: {out}')


if __name__ == '__main__':
    main()
