# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The command that counts FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from composer_bema.flops import Architecture

__all__ = ['flops']


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


@click.command()
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
