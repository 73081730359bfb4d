# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The ``composer-bema`` command; its commands import what they need when they run, so that help comes at once."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from composer_bema.version import __version__

if TYPE_CHECKING:
    from composer_bema.flops import Architecture
    from composer_bema.offline.plan import Average
    from composer_bema.offline.settings import Setting

__all__ = ['main']

RULE_HELP = 'bema, ema, ouema, dema, lawa, swa_window or decay_merge'


class WrongInput(click.ClickException):
    """A setting or file is wrong."""

    exit_code = 2


class OneSentence(click.Group):
    """A group whose commands report a wrong setting or file as one sentence (exit code 2) instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ``--traceback`` lets its errors through as they are."""
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            if ctx.params['traceback']:
                raise
            sentence = ' '.join(str(error).split()) or type(error).__name__
            raise WrongInput(sentence) from error


@click.group(cls=OneSentence, context_settings={'help_option_names': ['-h', '--help']})
@click.option('--traceback', is_flag=True, help='Show where an error was raised.')
@click.version_option(__version__)
def main(traceback: bool) -> None:
    """Weight averaging without the lag (BEMA) for MosaicML Composer."""
    del traceback  # read by OneSentence


@main.command()
@click.argument('file', type=click.Path())
@click.argument('overrides', nargs=-1, metavar='[KEY=VALUE]...')
@click.option('--dry-run', is_flag=True, help='Check the settings without training, reading data or downloading.')
def train(file: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train as the YAML FILE says; KEY=VALUE overrides its settings (optimizer.lr=1e-4)."""
    # Read when torch is loaded: OpenMP threads that spin while they wait make a busy machine ten times slower.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    from composer_bema.training.checks import check_config
    from composer_bema.training.config import load_config
    from composer_bema.training.run import train as run_training

    config = load_config(file, overrides)
    if dry_run:
        check_config(config)
        click.echo(f"'{file}' is fine.")
        return
    _show_log(config.python_log_level)
    _say(run_training(config))


@main.command()
@click.argument('target', type=click.Path(), metavar='RUN_OR_CHECKPOINT')
@click.argument('overrides', nargs=-1, metavar='[KEY=VALUE]...')
@click.option('--at', type=click.IntRange(min=1), help='The step of the checkpoint to take from a run.')
@click.option('--fraction', default=0.2, show_default=True, help='The part of the branch that the cooldown takes.')
@click.option(
    '--decay',
    default='1-sqrt',
    show_default=True,
    help='linear, 1-sqrt, cosine, square, mirror-cosine, or exponential, which needs scheduler.alpha_f=...',
)
@click.option('--dry-run', is_flag=True, help='Say where the branch starts and ends, and train nothing.')
def cooldown(
    target: str, overrides: tuple[str, ...], at: int | None, fraction: float, decay: str, dry_run: bool
) -> None:
    """Train a branch of a run at a constant learning rate that ends with a cooldown; the run is left as it is.

    Of a run's folder the checkpoint is taken whose branch ends with the run, or last before it, unless --at names one.
    The branch has the run's settings, and a folder beside its own; KEY=VALUE overrides them.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    from composer_bema.training.checks import check_config
    from composer_bema.training.cooldown import cooldown_config
    from composer_bema.training.run import train as run_training

    _show_log(None, _is_first_process())
    config = cooldown_config(target, fraction, decay, overrides, at=at)
    _show_log(config.python_log_level, _is_first_process())
    if dry_run:
        check_config(config)
        return
    _say(run_training(config))


@main.command()
@click.argument('paths', nargs=-1, required=True)
@click.option('--out-root', required=True, type=click.Path(), help='The directory to make.')
@click.option('--tokenizer', help="'bytes', or a Hugging Face name or folder; without one, texts are kept as they are.")
@click.option('--concat-tokens', type=click.IntRange(min=2), help='Tokens in a sample; documents are joined and cut.')
@click.option('--text-field', default='text', show_default=True, help='The name of the text in JSONL rows.')
@click.option('--compression', help='How to compress the shards, e.g. zstd.')
def convert(
    paths: tuple[str, ...],
    out_root: str,
    tokenizer: str | None,
    concat_tokens: int | None,
    text_field: str,
    compression: str | None,
) -> None:
    """Convert text or JSONL files (PATHS may be glob patterns) to an MDS dataset for the `text` loader."""
    from composer_bema.training.data.convert import convert_to_mds
    from composer_bema.training.tokenizers import build_tokenizer

    built = build_tokenizer({'name': tokenizer}) if tokenizer else None
    count = convert_to_mds(paths, out_root, built, concat_tokens, text_field, compression)
    click.echo(f"Wrote {count} samples to '{out_root}'.")


@main.command()
@click.argument('checkpoint', type=click.Path())
@click.option('--out', required=True, type=click.Path(), help='The folder to make.')
@click.option(
    '--weights',
    default='average',
    show_default=True,
    help="'average', 'training', a buffer of the average such as 'ema' or 'theta_0', or 'model': what the checkpoint's "
    'model holds, whichever it is.',
)
@click.option('--average', help="Which average, by its class ('BEMA'), where the run had several.")
@click.option('--precision', help="float32, bfloat16, float16 or float64.  [default: the model's]")
def export(checkpoint: str, out: str, weights: str, average: str | None, precision: str | None) -> None:
    """Write weights of a Composer CHECKPOINT (a file, or a folder of a sharded one) as a Hugging Face folder."""
    from composer_bema.offline.export import export as export_checkpoint

    _show_log(None)
    export_checkpoint(checkpoint, out, weights=weights, average=average, precision=precision)
    click.echo(f"Wrote the {weights} weights of '{checkpoint}' to '{out}'.")


class NumberOrNone(click.ParamType):
    """A number, or ``none``, which switches something off."""

    name = 'number|none'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Keep ``none`` as a text: for click a missing value is None."""
        if str(value).lower() == 'none':
            return 'none'
        return click.FLOAT.convert(value, param, ctx)


def average_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings of averages, and the choice of checkpoints."""
    number, steps = NumberOrNone(), click.IntRange(min=0)
    options = [
        click.option('--update-freq', type=steps, help='Steps between updates.  [default: every checkpoint]'),
        click.option('--update-after', type=steps, default=0, show_default=True, help='The step to start from.'),
        click.option('--at', type=steps, multiple=True, help='A step to average at; repeatable.  [default: the last]'),
        click.option('--ema-power', type=number, help="kappa; 'none' keeps no history.  [default: 0.5]"),
        click.option('--bias-power', type=number, help="eta; 'none' corrects nothing.  [default: 0.2]"),
        click.option('--lag', type=float, help='rho, the virtual starting age in steps.  [default: 10]'),
        click.option('--multiplier', type=float, help='gamma, the pace of the schedules.  [default: 1]'),
        click.option('--min-ema-multiplier', type=float, help='The floor of beta.  [default: 0]'),
        click.option('--half-life', type=float, help='In steps; a constant rate in place of --ema-power.'),
        click.option('--smoothing', type=float, help='What an EMA keeps at an update, in place of --ema-power.'),
        click.option('--schedule', help="'paper', or 'reference': that of the paper's offline code.  [default: paper]"),
        click.option('--ema-update-after', type=steps, help='With the latter, the step from which beta counts.'),
        click.option('--window', type=int, help='Of lawa and decay_merge: the number of checkpoints.'),
        click.option('--decay', help="Of decay_merge: 'linear', '1-sqrt' or 'cosine'.  [default: linear]"),
        click.option('--horizon', type=int, help='Of swa_window: the steps that are averaged.'),
        click.option('--period', type=int, help='Of swa_window: the steps of a period.  [default: the horizon]'),
        click.option('--initial-model', help='The weights before the first step: a folder, file or hub name.'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument('checkpoints', type=click.Path())
@click.option('--rule', required=True, help=RULE_HELP)
@average_options
@click.option('--weights', default='training', show_default=True, help="Of Composer checkpoints: or 'model', as it is.")
@click.option('--copy', multiple=True, help="Names (patterns) of tensors to take from the average's step; repeatable.")
@click.option('--format', help="'huggingface' or 'composer'.  [default: the former where possible]")
@click.option('--dtype', help="float32, bfloat16, float16 or float64.  [default: the checkpoints']")
@click.option('--max-shard-size', default='5GB', show_default=True, help='The size of a file of weights.')
@click.option('--out', type=click.Path(), help='The folder to make.')
@click.option('--dry-run', is_flag=True, help='Print what each checkpoint would weigh, and read nothing.')
def stabilize(
    checkpoints: str,
    rule: str,
    out: str | None,
    dry_run: bool,
    at: tuple[int, ...],
    initial_model: str | None,
    weights: str,
    copy: tuple[str, ...],
    format: str | None,
    dtype: str | None,
    max_shard_size: str,
    **options: Any,
) -> None:
    """Average a directory of CHECKPOINTS, in one reading, as the same rule would have averaged during training.

    Several processes share the work: torchrun --nproc-per-node 4 -m composer_bema stabilize ...
    """
    from composer_bema.offline.ranks import is_first_rank, joined
    from composer_bema.offline.stabilize import stabilize as write_average
    from composer_bema.offline.trajectory import Trajectory

    setting = _setting(rule, options)
    if dry_run:
        trajectory = Trajectory(checkpoints, initial_model=initial_model)
        table = _weights_table(trajectory.plan(setting, at), trajectory.steps)
        if _is_first_process():
            click.echo(table)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    with joined():
        _show_log(None, is_first_rank())
        folders = write_average(
            checkpoints,
            out,
            setting,
            at=at,
            initial_model=initial_model,
            weights=weights,
            copy=copy,
            format=format,  # pyright: ignore[reportArgumentType]
            dtype=dtype,
            max_shard_size=max_shard_size,
            show_progress=True,
        )
        if is_first_rank():
            click.echo(f'Wrote {setting} to {", ".join(map(repr, map(str, folders)))}.')


@main.command()
@click.argument('checkpoints', type=click.Path())
@click.argument('overrides', nargs=-1, metavar='[KEY=VALUE]...')
@click.option('--config', required=True, type=click.Path(), help='The YAML of the sweep.')
@click.option('--out', required=True, type=click.Path(), help='The folder to make.')
def sweep(checkpoints: str, overrides: tuple[str, ...], config: str, out: str) -> None:
    """Average a directory of CHECKPOINTS under many settings, in one reading: as models, or by their losses."""
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    from composer_bema.offline.ranks import is_first_rank, joined
    from composer_bema.training.sweep import run_sweep

    with joined():
        _show_log(None, is_first_rank())
        closing = run_sweep(checkpoints, config, out, overrides)
        if is_first_rank():
            click.echo(closing)


@main.command()
@click.argument('checkpoints', type=click.Path())
@click.option('--rule', 'rules', required=True, multiple=True, help=RULE_HELP + '; repeatable')
@average_options
@click.option('--out', type=click.Path(), help='A PNG file to draw.')
def weights(
    checkpoints: str,
    rules: tuple[str, ...],
    at: tuple[int, ...],
    initial_model: str | None,
    out: str | None,
    **options: Any,
) -> None:
    """Show what each of a directory of CHECKPOINTS weighs in averages; options go to the rules that have them."""
    from composer_bema.offline.plan import weight_curves
    from composer_bema.offline.trajectory import Trajectory
    from composer_bema.plots import check_folder, plot_curves

    if out is not None:
        check_folder(out)
    trajectory = Trajectory(checkpoints, initial_model=initial_model)
    averages = [average for rule in rules for average in trajectory.plan(_setting(rule, options, rules), at)]
    click.echo(_weights_table(averages, trajectory.steps))
    if out is not None:
        plot_curves(weight_curves(averages, trajectory.steps), out, 'step of the checkpoint', 'weight in the average')
        click.echo(f"Drew '{out}'.")


class TokenCount(click.ParamType):
    """A positive whole number, which may be written as ``100e9``."""

    name = 'number'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Make it an int, with which products stay exact."""
        number = click.FLOAT.convert(value, param, ctx)
        if not number.is_integer() or number < 1:
            self.fail(f'{value!r} is no positive whole number.', param, ctx)
        return int(number)


def architecture_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of an architecture."""
    size = click.IntRange(min=1)
    options = [
        click.option('--hidden-size', type=size, help='The width of the residual stream.'),
        click.option('--intermediate-size', type=size, help='The width of an MLP; with experts, of one of them.'),
        click.option('--num-hidden-layers', type=size, help='The number of blocks.'),
        click.option('--num-attention-heads', type=size, help='The number of heads.'),
        click.option('--vocab-size', type=size, help='The rows of the embedding.'),
        click.option('--num-key-value-heads', type=size, help='Those of keys and values.  [default: as many]'),
        click.option('--head-dim', type=size, help='The width of a head.  [default: hidden size / heads]'),
        click.option('--gated-mlp/--no-gated-mlp', default=None, help='Three matrices or two.  [default: three]'),
        click.option(
            '--tie-word-embeddings/--no-tie-word-embeddings',
            default=None,
            help='Whether input and output share one matrix.  [default: they do]',
        ),
        click.option('--num-experts', type=size, help='The experts in a layer.  [default: none]'),
        click.option('--num-experts-per-tok', type=size, help='Those that a token goes to.'),
        click.option(
            '--shared-expert-intermediate-size', type=size, help='The width of the MLP that all tokens go to.'
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument('target', required=False)
@click.argument('overrides', nargs=-1, metavar='[KEY=VALUE]...')
@click.option(
    '--sequence-length',
    type=click.IntRange(min=1),
    help="In tokens.  [default: the YAML's max_seq_len, the configuration's longest]",
)
@click.option('--tokens', type=TokenCount(), help="To train on, e.g. 100e9.  [default: the YAML's, in full rows]")
@architecture_options
def flops(
    target: str | None, overrides: tuple[str, ...], sequence_length: int | None, tokens: int | None, **numbers: Any
) -> None:
    """Count the parameters and FLOPs of a decoder transformer: forward, and three times that for training.

    TARGET is a Hugging Face folder, config.json or hub name, or a training YAML with KEY=VALUE overrides; without one
    the numbers say it. Attention is counted as if it were not causal, the embedding as two matrix products.
    """
    from composer_bema.flops import Architecture

    given = {name: number for name, number in numbers.items() if number is not None}
    if target is not None:
        if given:
            raise click.UsageError(f'Give a TARGET or the numbers (--{next(iter(given)).replace("_", "-")}), not both.')
        architecture, length, count = _described(target, overrides)
    else:
        for field in dataclasses.fields(Architecture):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise click.UsageError(f"Without a TARGET, the option '--{field.name.replace('_', '-')}' is needed.")
        architecture, length, count = Architecture(**given), None, None
    length = sequence_length or length
    if length is None:
        raise click.UsageError("Missing option '--sequence-length'.")
    click.echo(_flops_table(architecture, length, tokens or count))


def _described(target: str, overrides: Sequence[str]) -> tuple[Architecture, int | None, int | None]:
    """The architecture that a target says, its sequence length and tokens of training; None for what it leaves open."""
    from composer_bema.flops import architecture_of, context_length, read_config

    if Path(target).suffix in ('.yaml', '.yml'):
        from composer_bema.training.checks import check_config
        from composer_bema.training.config import load_config
        from composer_bema.training.cost import architecture_of_run, sequence_length_of_run, tokens_of_run

        run = load_config(target, overrides)
        check_config(run)
        return architecture_of_run(run), sequence_length_of_run(run), tokens_of_run(run)
    if overrides:
        raise click.UsageError(f"'{overrides[0]}': only the settings of a YAML can be overridden.")
    if not Path(target).exists():
        from composer_bema.formats.pretrained import download

        target = str(download(target, ['config.json']))
    config = read_config(target)
    return architecture_of(config), context_length(config), None


def _flops_table(architecture: Architecture, length: int, tokens: int | None) -> str:
    from tabulate import tabulate

    from composer_bema.flops import active_parameter_count, forward_flops, parameter_count, training_flops

    rows = {'parameters': parameter_count(architecture)}
    if architecture.num_experts:
        rows['parameters that a token meets'] = active_parameter_count(architecture)
    forward, training = forward_flops(architecture, length), training_flops(architecture, length)
    rows['tokens in a sequence'] = length
    rows['forward FLOPs per token'] = forward // length
    rows['forward FLOPs per sequence'] = forward
    rows['training FLOPs per token'] = training // length
    rows['training FLOPs per sequence'] = training
    if tokens is not None:
        rows['tokens of training'] = tokens
        rows['training FLOPs in total'] = training_flops(architecture, length, tokens)
    table = [(name, f'{number:,}', f'{number:.3g}') for name, number in rows.items()]
    return tabulate(table, ['', 'exactly', 'about'], disable_numparse=True, colalign=('left', 'right', 'right'))


def _setting(rule: str, options: dict[str, Any], rules: Sequence[str] = ()) -> Setting:
    """Make a setting of a rule of the options that were given; of several ``rules`` each takes those that it has."""
    from composer_bema.offline.settings import Setting, settings_of

    steps = {name: options[name] for name in ('update_freq', 'update_after')}
    given = {n: None if v == 'none' else v for n, v in options.items() if v is not None and n not in steps}
    others = {name for other in rules for name in settings_of(other)}
    taken = {n: v for n, v in given.items() if n in settings_of(rule) or n not in others}
    return Setting(rule, taken, **steps)


def _weights_table(averages: Sequence[Average], steps: Sequence[int]) -> str:
    from tabulate import tabulate

    from composer_bema.offline.plan import weight_table

    return tabulate(weight_table(averages, steps), headers='keys', floatfmt='.6f')


def _say(closing: str) -> None:
    """Print the closing words of a run, which the first of its processes has."""
    if closing:
        click.echo(closing)


def _is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that a launcher has started."""
    return os.environ.get('RANK', '0') == '0'


def _show_log(level: str | None, is_first_rank: bool = True) -> None:
    """Show our log from ``level`` on; unless told, what is about to be done, and of the rest warnings only."""
    logging.basicConfig(format='%(levelname)s: %(message)s')
    if level:
        logging.getLogger('composer_bema').setLevel(level.upper())
    elif is_first_rank:
        for room in ('offline', 'training'):
            logging.getLogger(f'composer_bema.{room}').setLevel(logging.INFO)
