# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The command that evaluates weights on tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from composer_bema.cli.averages import RULE_HELP, average_options, build_setting
from composer_bema.cli.processes import clearing_up, show_log

if TYPE_CHECKING:
    import torch

    from composer_bema.evaluation.suite import Texts
    from composer_bema.offline.settings import Setting

__all__ = ['evaluate']

TRAINING = 'training'


class NamedFile(click.ParamType):
    """A name and a file, written as ``name=file``."""

    name = 'name=file'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first sign of equality."""
        name, _, file = str(value).partition('=')
        if not name or not file:
            self.fail(f'{value!r} is not of the form NAME=FILE.', param, ctx)
        return name, file


def question_options(command: Any) -> Any:
    """Give a command the settings of how questions are asked."""
    count = click.IntRange(min=1)
    options = [
        click.option(
            '--mode',
            type=click.Choice(['sample', 'greedy', 'log-likelihood']),
            default='sample',
            show_default=True,
            help='Draw answers at temperature 1, take the likeliest one, or compare the choices.',
        ),
        click.option('--samples', type=count, default=50, show_default=True, help='Answers to each question.'),
        click.option('--questions', type=count, help='Of each set.  [default: 64; gsm8k 128]'),
        click.option('--few-shot', type=click.IntRange(min=0), default=0, show_default=True, help='Examples before.'),
        click.option('--chain-of-thought', is_flag=True, help='Ask for steps first; gsm8k always does.'),
        click.option('--seed', type=click.IntRange(min=0), default=37371, show_default=True, help='Of the choice.'),
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


def text_options(command: Any) -> Any:
    """Give a command the choice of texts."""
    count = click.IntRange(min=1)
    options = [
        click.option(
            '--text', type=NamedFile(), multiple=True, help='NAME=FILE, a text or JSONL file for `loss`; repeatable.'
        ),
        click.option('--run', type=click.Path(), help="A run's folder or YAML whose texts are taken.  [default: its]"),
        click.option(
            '--max-seq-len',
            type=click.IntRange(min=2),
            help="Of --text.  [default: 1024, or the model's context if shorter]",
        ),
        click.option('--batches', type=count, help='Of each text only the first.  [default: all]'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument('target', metavar='TARGET')
@click.option('--tasks', required=True, help='loss, boolq, gsm8k, mmlu_hs; several with commas.')
@click.option('--out', required=True, type=click.Path(), help='The folder to make.')
@click.option('--rule', 'rules', multiple=True, help=f'training, {RULE_HELP}; repeatable. TARGET is then a directory.')
@average_options
@click.option('--every-update', is_flag=True, help='Take averages at all of their updates, not only the last.')
@click.option('--weights', help='Of Composer checkpoints, see `export`.  [default: average; with --rule training]')
@click.option('--average', help="Which average, by its class ('BEMA'), where the run had several.")
@question_options
@text_options
@click.option('--batch-size', type=click.IntRange(min=1), default=16, show_default=True, help='Sequences at a time.')
@click.option('--tokenizer', help="A folder or hub name.  [default: the target's]")
@click.option('--dtype', help="float32, bfloat16, float16 or float64.  [default: the target's]")
@click.option('--device', help='Such as cpu or cuda:1.  [default: the GPU where there is one]')
def evaluate(
    target: str,
    tasks: str,
    out: str,
    rules: tuple[str, ...],
    at: tuple[int, ...],
    initial_model: str | None,
    every_update: bool,
    weights: str | None,
    average: str | None,
    mode: Any,
    samples: int,
    questions: int | None,
    few_shot: int,
    chain_of_thought: bool,
    seed: int,
    chat: bool | None,
    data: tuple[tuple[str, str], ...],
    save_generations: bool,
    backend: Any,
    text: tuple[tuple[str, str], ...],
    run: str | None,
    max_seq_len: int | None,
    batches: int | None,
    batch_size: int,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
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
    suite = Suite(
        names,
        Protocol(mode, samples, questions, few_shot, chain_of_thought, seed),
        texts=_texts(target, text, run, max_seq_len, batch_size, batches) if LOSS in names else None,
        files=dict(data),
        chat=chat,
        backend=backend,
        batch_size=batch_size,
    )
    settings = _settings(rules, options)
    chosen = {'weights': weights, 'dtype': dtype, 'tokenizer': tokenizer}
    if at and every_update:
        raise click.UsageError('Give --at or --every-update, not both.')
    if settings:
        if average is not None:
            raise click.UsageError('--average belongs to one checkpoint: leave it out beside --rule.')
        chosen |= {'at': at, 'every_update': every_update, 'initial_model': initial_model}
        chosen['weights'] = weights or TRAINING
    else:
        _refuse_without_rule(at=at, every_update=every_update, initial_model=initial_model, **options)
        chosen |= {'average': average, 'weights': weights or 'average'}
    opened = open_target(target, settings, device=_device(device), **chosen)
    click.echo(run_evaluation(opened, suite, out, save_generations=save_generations))


def _settings(rules: Sequence[str], options: dict[str, Any]) -> dict[str, Setting]:
    """Make the settings of the rules, by what they are called; training weights are an average of one checkpoint."""
    from composer_bema.offline.settings import Setting

    steps = {name: options[name] for name in ('update_freq', 'update_after')}
    averages = [rule for rule in rules if rule != TRAINING]
    settings = {}
    for rule in rules:
        setting = (
            Setting('lawa', {'window': 1}, **steps) if rule == TRAINING else build_setting(rule, options, averages)
        )
        name = TRAINING if rule == TRAINING else str(setting)
        if name in settings:
            raise click.UsageError(f"The rule '{name}' is there twice.")
        settings[name] = setting
    return settings


def _device(name: str | None) -> torch.device:
    import torch

    device = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"There is no device '{device}' here: {str(error).splitlines()[0]}") from error


def _refuse_without_rule(**options: Any) -> None:
    name = next((name for name, value in options.items() if value), None)
    if name is not None:
        raise click.UsageError(f'--{name.replace("_", "-")} belongs to averages: add --rule.')


def _texts(
    target: str,
    text: Sequence[tuple[str, str]],
    run: str | None,
    max_seq_len: int | None,
    batch_size: int,
    batches: int | None,
) -> Texts:
    """Return the texts of files, of a run, or of the run that the target belongs to."""
    from pathlib import Path

    from composer_bema.training.config import load_config
    from composer_bema.training.data.texts import texts_of_files, texts_of_run
    from composer_bema.training.outputs import CONFIG_FILE, run_folder_of

    if text:
        if run is not None:
            raise click.UsageError('Give --text or --run, not both.')
        files: dict[str, list[str]] = {}
        for name, file in text:
            files.setdefault(name, []).append(file)
        return texts_of_files(files, max_seq_len, batch_size, batches)
    folder = Path(run) if run is not None else run_folder_of(target)
    if folder is None:
        raise click.UsageError("The task 'loss' needs texts: add --text NAME=FILE, or --run with a run's folder.")
    config = load_config(str(folder / CONFIG_FILE if folder.is_dir() else folder))
    return texts_of_run(config, batch_size, batches)
