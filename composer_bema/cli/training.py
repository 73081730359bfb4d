# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Commands that train, and make data for training."""

from __future__ import annotations

import os

import click

from composer_bema.cli.processes import is_first_process, say, show_log

__all__ = ['convert', 'cooldown', 'report', 'train']


@click.command()
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
    show_log(config.python_log_level)
    say(run_training(config))


@click.command()
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

    show_log(None, is_first_process())
    config = cooldown_config(target, fraction, decay, overrides, at=at)
    show_log(config.python_log_level, is_first_process())
    if dry_run:
        check_config(config)
        return
    say(run_training(config))


@click.command()
@click.argument('folder', type=click.Path(), metavar='RUN_FOLDER')
@click.option('--out', type=click.Path(), help='The file to write.  [default: report.html in the folder]')
def report(folder: str, out: str | None) -> None:
    """Write an HTML page about the run in RUN_FOLDER: settings, curves, averages, checkpoints.

    The page is one file that needs no network. The run may still be going on.
    """
    from composer_bema.training.run_page import write_run_page

    click.echo(f"Wrote '{write_run_page(folder, out)}'.")


@click.command()
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
