# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The command that evaluates weights on tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from composer_bema.cli.averages import RULE_HELP, average_options, build_setting
from composer_bema.cli.options import NamedFile, grouped, refuse
from composer_bema.cli.processes import clearing_up, show_log

if TYPE_CHECKING:
    import torch

    from composer_bema.evaluation.suite import Texts
    from composer_bema.offline.settings import Setting

__all__ = ['evaluate']

_COUNT = click.IntRange(min=1)


class Asking(NamedTuple):
    """How questions are asked."""

    mode: Any
    samples: int
    questions: int | None
    few_shot: int
    chain_of_thought: bool
    seed: int
    chat: bool | None
    data: tuple[tuple[str, str], ...]
    save_generations: bool
    backend: Any


class Reading(NamedTuple):
    """Texts of which the loss is measured."""

    text: tuple[tuple[str, str], ...]
    run: str | None
    max_seq_len: int | None
    batches: int | None


class Holding(NamedTuple):
    """Which weights of a target are taken, and how they are held."""

    weights: str | None
    average: str | None
    tokenizer: str | None
    dtype: str | None
    device: str | None


class Averaging(NamedTuple):
    """Which averages of a directory are taken."""

    rules: tuple[str, ...]
    every_update: bool


_asking = grouped(
    'asking',
    Asking,
    [
        click.option(
            '--mode',
            type=click.Choice(['sample', 'greedy', 'log-likelihood']),
            default='sample',
            show_default=True,
            help='Draw answers at temperature 1, take the likeliest one, or compare the choices.',
        ),
        click.option('--samples', type=_COUNT, default=50, show_default=True, help='Answers drawn to each question.'),
        click.option('--questions', type=_COUNT, help='Of each set.  [default: 64; gsm8k 128]'),
        click.option('--few-shot', type=click.IntRange(min=0), default=0, show_default=True, help='Examples before.'),
        click.option('--chain-of-thought', is_flag=True, help='Ask for steps first; gsm8k always does.'),
        click.option(
            '--seed',
            type=click.IntRange(0, 2**32 - 1),
            default=37371,
            show_default=True,
            help='Of the choice of questions, and of the answers that are drawn.',
        ),
        click.option(
            '--chat-template/--no-chat-template',
            'chat',
            default=None,
            help="Ask through the tokenizer's chat template.  [default: if it has one]",
        ),
        click.option(
            '--data', type=NamedFile(), multiple=True, help='TASK=FILE, a JSONL file in place of the hub; repeatable.'
        ),
        click.option('--save-generations', is_flag=True, help='Write every prompt and its answers.'),
        click.option(
            '--backend', type=click.Choice(['hf', 'vllm']), default='hf', show_default=True, help='What generates.'
        ),
    ],
)

_reading = grouped(
    'reading',
    Reading,
    [
        click.option(
            '--text', type=NamedFile(), multiple=True, help='NAME=FILE, a text or JSONL file for `loss`; repeatable.'
        ),
        click.option('--run', type=click.Path(), help="A run's folder or YAML whose texts are taken.  [default: its]"),
        click.option(
            '--max-seq-len',
            type=click.IntRange(min=2),
            help="Of --text.  [default: 1024, or the model's context if shorter]",
        ),
        click.option('--batches', type=_COUNT, help='Of each text only the first.  [default: all]'),
    ],
)

_holding = grouped(
    'holding',
    Holding,
    [
        click.option(
            '--weights', help='Of Composer checkpoints, see `export`.  [default: average; with --rule training]'
        ),
        click.option('--average', help="Which average, by its class ('BEMA'), where the run had several."),
        click.option('--tokenizer', help="A folder or hub name.  [default: the target's]"),
        click.option('--dtype', help="float32, bfloat16, float16 or float64.  [default: the target's]"),
        click.option('--device', help='Such as cpu or cuda:1.  [default: the GPU where there is one]'),
    ],
)

_averaging = grouped(
    'averaging',
    Averaging,
    [
        click.option('--rule', 'rules', multiple=True, help=f'{RULE_HELP}; repeatable. TARGET is then a directory.'),
        click.option('--every-update', is_flag=True, help='Take averages at all of their updates, not only the last.'),
    ],
)


@click.command()
@click.argument('target', metavar='TARGET')
@click.option('--tasks', required=True, help='loss, boolq, gsm8k, mmlu_hs; several with commas.')
@click.option('--out', required=True, type=click.Path(), help='The folder to make.')
@_averaging
@average_options
@_holding
@_asking
@_reading
@click.option('--batch-size', type=_COUNT, default=16, show_default=True, help='Sequences at a time.')
def evaluate(
    target: str,
    tasks: str,
    out: str,
    averaging: Averaging,
    holding: Holding,
    asking: Asking,
    reading: Reading,
    batch_size: int,
    **options: Any,
) -> None:
    """Measure weights on tasks: their loss on texts, or the accuracy of their answers to questions.

    TARGET is a Hugging Face folder or name, a Composer checkpoint, or with --rule a directory of checkpoints, of which
    each average is evaluated in memory. Results go to a folder: JSON, a table, pictures over the steps.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    from composer_bema.evaluation.evaluate import evaluate as run_evaluation
    from composer_bema.evaluation.loss import LOSS
    from composer_bema.evaluation.suite import Suite
    from composer_bema.evaluation.targets import open_target
    from composer_bema.evaluation.tasks import Protocol

    show_log(None)
    click.get_current_context().with_resource(clearing_up())
    names = [name.strip() for name in tasks.split(',') if name.strip()]
    _refuse_idle(asking, reading, averaging, options, loss=LOSS in names, questions=bool({*names} - {LOSS}))
    suite = Suite(
        names,
        Protocol(
            mode=asking.mode,
            samples=asking.samples,
            questions=asking.questions,
            few_shot=asking.few_shot,
            chain_of_thought=asking.chain_of_thought,
            seed=asking.seed,
        ),
        texts=_texts(target, reading, batch_size) if LOSS in names else None,
        files=dict(asking.data),
        chat=asking.chat,
        backend=asking.backend,
        batch_size=batch_size,
    )
    settings = _settings(averaging.rules, options)
    chosen = {name: value for name, value in holding._asdict().items() if name != 'device' and value is not None}
    if settings:
        chosen |= {'at': options['at'], 'initial_model': options['initial_model']}
        chosen['every_update'] = averaging.every_update
    opened = open_target(target, settings, device=_device(holding.device), **chosen)
    click.echo(run_evaluation(opened, suite, out, save_generations=asking.save_generations))


def _refuse_idle(
    asking: Asking, reading: Reading, averaging: Averaging, options: dict[str, Any], *, loss: bool, questions: bool
) -> None:
    """Refuse options that would have no effect beside the others."""
    if not loss:
        refuse(Reading._fields, "belongs to the task 'loss', which is not among --tasks.")
    elif not reading.text:
        refuse(['max_seq_len'], "belongs to --text: the texts of a run have the run's length.")
    if not questions:
        refuse(Asking._fields, 'belongs to questions, and none of --tasks asks any.')
    elif asking.mode != 'sample':
        refuse(['samples'], f'belongs to --mode sample: with {asking.mode} there is one answer.')
    if not averaging.rules:
        refuse([*options, 'every_update'], 'belongs to averages: add --rule.')
    else:
        refuse(['average'], 'belongs to one checkpoint: leave it out beside --rule.')
    if averaging.every_update and options['at']:
        raise click.UsageError('Give --at or --every-update, not both.')


def _settings(rules: Sequence[str], options: dict[str, Any]) -> dict[str, Setting]:
    """Make the settings of the rules, by what they are called."""
    own = {name: value for name, value in options.items() if name not in ('at', 'initial_model')}
    settings = {}
    for rule in rules:
        setting = build_setting(rule, own, rules)
        if str(setting) in settings:
            raise click.UsageError(f"The rule '{setting}' is there twice.")
        settings[str(setting)] = setting
    return settings


def _device(name: str | None) -> torch.device:
    import torch

    device = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"There is no device '{device}' here: {str(error).splitlines()[0]}") from error


def _texts(target: str, reading: Reading, batch_size: int) -> Texts:
    """Return the texts of files, of a run, or of the run that the target belongs to."""
    from pathlib import Path

    from composer_bema.training.config import load_config
    from composer_bema.training.data.texts import RunTexts, TextFiles
    from composer_bema.training.outputs import CONFIG_FILE, run_folder_of

    if reading.text:
        if reading.run is not None:
            raise click.UsageError('Give --text or --run, not both.')
        files: dict[str, list[str]] = {}
        for name, file in reading.text:
            files.setdefault(name, []).append(file)
        return TextFiles(files, reading.max_seq_len, batch_size, reading.batches)
    folder = Path(reading.run) if reading.run is not None else run_folder_of(target)
    if folder is None:
        raise click.UsageError("The task 'loss' needs texts: add --text NAME=FILE, or --run with a run's folder.")
    config = load_config(str(folder / CONFIG_FILE if folder.is_dir() else folder))
    return RunTexts(config, batch_size, reading.batches)
