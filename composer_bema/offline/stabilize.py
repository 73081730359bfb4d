# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages of a directory of checkpoints, written as models."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Union, get_args

import torch

from composer_bema.formats.composer import TRAINING
from composer_bema.formats.huggingface import WeightsWriter, new_folder
from composer_bema.formats.manifest import write_manifest
from composer_bema.formats.safetensors_files import MAX_SHARD_SIZE
from composer_bema.formats.tensors import dtype_named
from composer_bema.offline.outputs import Format, weights_writer
from composer_bema.offline.plan import Average
from composer_bema.offline.ranks import all_succeed, from_first_rank, is_first_rank
from composer_bema.offline.settings import Setting
from composer_bema.offline.trajectory import Reading, Trajectory

__all__ = ['stabilize', 'write_averages']

log = logging.getLogger(__name__)


def stabilize(
    checkpoints: Union[str, Path],
    out: Union[str, Path],
    setting: Setting,
    *,
    at: Sequence[int] = (),
    initial_model: Optional[str] = None,
    weights: str = TRAINING,
    copy: Sequence[str] = (),
    format: Optional[Format] = None,
    dtype: Optional[str] = None,
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
    show_progress: bool = False,
) -> list[Path]:
    """Writes an average of a directory of checkpoints, as of one step or several, in one reading.

    The average is what the same rule would have come to during training, updated at the steps of the checkpoints. Of
    several processes (``torchrun``) each has to call this, and computes its share of the tensors.

    Args:
        checkpoints (str | Path): The directory: Hugging Face folders ``checkpoint-N`` or ``stepN``, Composer's
            checkpoints, monolithic or sharded, or files ``NAME-N.safetensors``.
        out (str | Path): The folder to make. It is there when it is complete, and not before.
        setting (Setting): The average.
        at (Sequence[int]): The steps of updates after which it is wanted; of several each gets a folder ``stepN`` in
            ``out``. Default: the last update.
        initial_model (str, optional): The weights before the first step: a folder, a file, or a name on the hub.
        weights (str): Of Composer checkpoints the ``'training'`` weights, or what the ``'model'`` holds.
        copy (Sequence[str]): Patterns of the names of tensors that are taken from the checkpoint of the average's step.
        format (str, optional): ``'huggingface'`` or ``'composer'``. Default: the former, unless the checkpoints are
            Composer's of another model.
        dtype (str, optional): ``'float32'``, ``'bfloat16'``, ``'float16'`` or ``'float64'``. Default: the checkpoint's.
        max_shard_size (int | str): The size at which another file of weights begins. Default: ``'5GB'``.
        show_progress (bool): Whether to draw a bar. Default: ``False``.

    Returns:
        list[Path]: The folders of the averages.

    Raises:
        FileExistsError: If ``out`` is there and is not an empty folder.
        FileNotFoundError: If there is no such directory or initial model.
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range, or the checkpoints are damaged, missing, or do not fit together.

    Example:
        >>> setting = Setting('bema', {'bias_power': 0.2}, update_freq=400)
        >>> stabilize('checkpoints', 'bema', setting, initial_model='base')
        >>> model = AutoModelForCausalLM.from_pretrained('bema')
    """
    with all_succeed():
        trajectory = Trajectory(checkpoints, initial_model=initial_model, weights=weights, copy=copy)
        averages = trajectory.plan(setting, at)
    names = {f'step{average.step}' if len(averages) > 1 else '.': average for average in averages}
    return write_averages(
        trajectory,
        names,
        out,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        show_progress=show_progress,
    )


def write_averages(
    trajectory: Trajectory,
    averages: Mapping[str, Average],
    out: Union[str, Path],
    *,
    format: Optional[Format] = None,
    dtype: Optional[str] = None,
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
    show_progress: bool = False,
) -> list[Path]:
    """Writes averages of a trajectory, all in one reading.

    Args:
        trajectory (Trajectory): The checkpoints.
        averages (Mapping[str, Average]): The averages by the names of their folders in ``out``; ``'.'`` is it itself.

    The other arguments, and the errors, are those of :func:`stabilize`.
    """
    if format not in (None, *get_args(Format)):
        raise ValueError(f'format must be one of {", ".join(get_args(Format))}, not {format!r}.')
    written = dtype_named(dtype, 'dtype')
    threads = torch.get_num_threads()
    with all_succeed(), contextlib.ExitStack() as stack:
        # The first rank makes the folder, and removes it if anything fails.
        made = stack.enter_context(new_folder(out)) if is_first_rank() else None
        # A directory that a run is still writing to may have looked different to each of them.
        root, trajectory, averages = from_first_rank((made, trajectory, averages))
        assert root is not None
        with all_succeed():
            reading = trajectory.open(list(averages.values()))
            folders = {name: root / name for name in averages}
            writers = _writers(reading, folders, averages, format, written, max_shard_size)
        for writer in writers:
            stack.callback(writer.close)
        with all_succeed():
            if is_first_rank():
                _announce(reading, threads)
                for folder, writer in zip(folders.values(), writers, strict=True):
                    folder.mkdir(parents=True, exist_ok=True)
                    writer.create()
        with all_succeed():
            reading.compute(writers, threads, show_progress)
            for writer in writers:
                # Closed files are what the first rank sees of them on a network's file system.
                writer.close()
        with all_succeed():
            if is_first_rank():
                for folder, writer, average in zip(folders.values(), writers, averages.values(), strict=True):
                    writer.finish()
                    write_manifest(folder, average.setting.title, reading.manifest(average, dtype))
    return [Path(out) / name for name in averages]


def _writers(
    reading: Reading,
    folders: Mapping[str, Path],
    averages: Mapping[str, Average],
    format: Optional[Format],
    dtype: Optional[torch.dtype],
    max_shard_size: Union[int, str],
) -> list[WeightsWriter]:
    return [
        weights_writer(
            folders[name],
            reading.source_of(average),
            reading.specs(average, dtype),
            average.setting.title,
            format=format,
            max_shard_size=max_shard_size,
        )
        for name, average in averages.items()
    ]


def _announce(reading: Reading, threads: int) -> None:
    log.info(
        'Reading %.1f GB of %d checkpoints for %d averages; this takes about %d MiB of memory.',
        reading.nbytes / 1e9,
        len(reading.sources),
        len(reading.averages),
        reading.scratch_bytes(threads) / 2**20,
    )
