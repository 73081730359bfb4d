# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The ``composer-bema`` command; its commands import what they need when they run, so that help comes at once."""

import logging
import os
from typing import Any

import click

from composer_bema.version import __version__

__all__ = ['main']


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
    closing = run_training(config)
    if closing:
        click.echo(closing)


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
@click.option(
    '--precision',
    type=click.Choice(['float32', 'bfloat16', 'float16']),
    help="The dtype to write.  [default: the model's]",
)
def export(checkpoint: str, out: str, weights: str, average: str | None, precision: str | None) -> None:
    """Write weights of a Composer CHECKPOINT (a file, or a folder of a sharded one) as a Hugging Face folder."""
    from composer_bema.offline.export import export as export_checkpoint

    _show_log(None)
    export_checkpoint(checkpoint, out, weights=weights, average=average, precision=precision)
    click.echo(f"Wrote the {weights} weights of '{checkpoint}' to '{out}'.")


def _show_log(level: str | None) -> None:
    """Show our log from ``level`` on; unless told, what preparing a run has to say, and of the rest warnings only."""
    logging.basicConfig(format='%(levelname)s: %(message)s')
    if level:
        logging.getLogger('composer_bema').setLevel(level.upper())
    else:
        logging.getLogger('composer_bema.training').setLevel(logging.INFO)
