# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Which checkpoints of a run are whole, and the newest of them.

Composer writes a checkpoint under its final name from the first byte on, and replaces the link to the latest one by
removing it first. So a run that is killed may leave part of a checkpoint, and a link that leads to that part or nowhere
or is gone, from which Composer's ``autoresume`` goes on, or starts all over without a word.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple, Optional, Union

from composer_bema.formats.dcp import METADATA, stored_parts
from composer_bema.formats.unpickling import archive_problem, load_metadata

__all__ = ['INCOMPLETE', 'SavedCheckpoint', 'newest_complete_checkpoint', 'saved_checkpoints', 'why_incomplete']

log = logging.getLogger(__name__)

# What the name of a checkpoint that is not whole ends in, when it has been moved out of the way.
INCOMPLETE = '.incomplete'

# The names that Composer's Trainer gives checkpoints by default: of files, and of folders of sharded ones.
_NAME = re.compile(r'ep(?P<epoch>\d+)-ba(?P<batch>\d+)(?P<file>-rank0\.pt)?')


class SavedCheckpoint(NamedTuple):
    """One checkpoint of a run. They are ordered by the steps that had been done."""

    batch: int
    epoch: int
    path: Path


def newest_complete_checkpoint(
    save_folder: Union[str, Path],
    run_name: Optional[str] = None,
    *,
    set_aside: bool = False,
) -> Optional[str]:
    """Returns the path of the checkpoint to resume a run from, or None if there is none.

    Where Composer's ``autoresume`` follows the link to the latest checkpoint, this looks at all, and passes over those
    that a killed run has left unfinished. A checkpoint's tensors are not read for that.

    Args:
        save_folder (str | Path): The Trainer's, on a local disk. Its checkpoints have the Trainer's default names.
        run_name (str, optional): What stands for ``{run_name}`` in ``save_folder``.
        set_aside (bool): Whether to rename unfinished checkpoints that are newer than the one returned, to names that
            end in ``.incomplete``: Composer stops a resumed run that finds checkpoints of later steps. Nothing is
            deleted. Of several ranks one alone may do this. Default: ``False``.

    Example:
        >>> trainer = Trainer(
        ...     save_folder='checkpoints',
        ...     load_path=newest_complete_checkpoint('checkpoints', set_aside=True),
        ... )
    """
    folder = str(save_folder).replace('{rank}', '0')
    if run_name is not None:
        folder = folder.replace('{run_name}', run_name)
    for checkpoint in sorted(saved_checkpoints(Path(folder)), reverse=True):
        problem = why_incomplete(checkpoint.path)
        if not problem:
            return str(checkpoint.path)
        outcome = f"was renamed to '{_set_aside(checkpoint.path).name}'" if set_aside else 'is passed over'
        log.warning("The checkpoint '%s' is not whole (%s) and %s.", checkpoint.path, problem, outcome)
    return None


def saved_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    """Returns the checkpoints in a ``save_folder``, whole or not."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        # A link's target is there under its own name.
        if match and not entry.is_symlink() and entry.is_file() == bool(match['file']):
            found.append(SavedCheckpoint(int(match['batch']), int(match['epoch']), Path(entry.path)))
    return found


def why_incomplete(path: Path) -> str:
    """Returns what a checkpoint lacks, or '' if it is whole, as far as can be told without reading its tensors.

    Args:
        path (Path): A file of ``torch.save``, or the folder of a sharded checkpoint.
    """
    try:
        return archive_problem(path) if path.is_file() else _folder_problem(path)
    except FileNotFoundError:
        # Another rank may have set it aside meanwhile.
        return 'it is gone'


def _folder_problem(path: Path) -> str:
    # torch writes it when all else is on disk, and renames it then.
    if not (path / METADATA).is_file():
        return f"it has no '{METADATA}'"
    try:
        parts = stored_parts(load_metadata(path / METADATA))
    except ValueError as error:
        return str(error)
    ends: dict[str, int] = {}
    for part in parts.values():
        ends[part.file] = max(ends.get(part.file, 0), part.offset + part.length)
    for name, end in ends.items():
        file = path / name
        if not file.is_file():
            return f"its file '{name}' is missing"
        if file.stat().st_size < end:
            return f"its file '{name}' is cut off"
    return ''


def _set_aside(path: Path) -> Path:
    aside = path.with_name(path.name + INCOMPLETE)
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f'{path.name}.{number}{INCOMPLETE}')
    return path.rename(aside)
