# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Commands that read checkpoints and average them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from composer_bema.cli.averages import RULE_HELP, average_options, build_setting
from composer_bema.cli.options import grouped
from composer_bema.cli.processes import is_first_process, show_log

if TYPE_CHECKING:
    from composer_bema.offline.plan import Average
    from composer_bema.offline.settings import Setting

__all__ = ['export', 'stabilize', 'sweep', 'weights']


@click.command()
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

    show_log(None)
    export_checkpoint(checkpoint, out, weights=weights, average=average, precision=precision)
    click.echo(f"Wrote the {weights} weights of '{checkpoint}' to '{out}'.")


class Output(NamedTuple):
    """What is written of the checkpoints, and how."""

    weights: str
    copy: tuple[str, ...]
    format: str | None
    dtype: str | None
    max_shard_size: str


_output = grouped(
    'output',
    Output,
    [
        click.option(
            '--weights', default='training', show_default=True, help="Of Composer checkpoints: or 'model', as it is."
        ),
        click.option(
            '--copy', multiple=True, help="Names (patterns) of tensors to take from the average's step; repeatable."
        ),
        click.option('--format', help="'huggingface' or 'composer'.  [default: the former where possible]"),
        click.option('--dtype', help="float32, bfloat16, float16 or float64.  [default: the checkpoints']"),
        click.option('--max-shard-size', default='5GB', show_default=True, help='The size of a file of weights.'),
    ],
)


@click.command()
@click.argument('checkpoints', type=click.Path())
@click.option('--rule', required=True, help=RULE_HELP)
@average_options
@_output
@click.option('--out', type=click.Path(), help='The folder to make.')
@click.option('--dry-run', is_flag=True, help='Print what each checkpoint would weigh, and read nothing.')
def stabilize(
    checkpoints: str,
    rule: str,
    at: tuple[int, ...],
    initial_model: str | None,
    output: Output,
    out: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Average a directory of CHECKPOINTS, in one reading, as the same rule would have averaged during training.

    Several processes share the work: torchrun --nproc-per-node 4 -m composer_bema stabilize ...
    """
    from composer_bema.offline.ranks import is_first_rank, joined
    from composer_bema.offline.stabilize import stabilize as write_average

    setting = build_setting(rule, options)
    if dry_run:
        _show_weights(checkpoints, setting, at, initial_model)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    with joined():
        show_log(None, is_first_rank())
        written: dict[str, Any] = output._asdict()
        folders = write_average(
            checkpoints, out, setting, at=at, initial_model=initial_model, show_progress=True, **written
        )
        if is_first_rank():
            click.echo(f'Wrote {setting} to {", ".join(map(repr, map(str, folders)))}.')


@click.command()
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
        show_log(None, is_first_rank())
        closing = run_sweep(checkpoints, config, out, overrides)
        if is_first_rank():
            click.echo(closing)


@click.command()
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
    averages = [average for rule in rules for average in trajectory.plan(build_setting(rule, options, rules), at)]
    click.echo(_weights_table(averages, trajectory.steps))
    if out is not None:
        plot_curves(weight_curves(averages, trajectory.steps), out, 'step of the checkpoint', 'weight in the average')
        click.echo(f"Drew '{out}'.")


def _show_weights(checkpoints: str, setting: Setting, at: Sequence[int], initial_model: str | None) -> None:
    from composer_bema.offline.trajectory import Trajectory

    trajectory = Trajectory(checkpoints, initial_model=initial_model)
    table = _weights_table(trajectory.plan(setting, at), trajectory.steps)
    if is_first_process():
        click.echo(table)


def _weights_table(averages: Sequence[Average], steps: Sequence[int]) -> str:
    from tabulate import tabulate

    from composer_bema.offline.plan import weight_table

    return tabulate(weight_table(averages, steps), headers='keys', floatfmt='.6f')
