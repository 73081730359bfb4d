# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that Composer has compressed, by the extension of their names: unpacked for the time of reading them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ['uncompressed']

# The programs to which Composer hands a checkpoint, by the extensions that it gives them.
_PROGRAMS = {
    '.bz2': 'bzip2',
    '.gz': 'gzip',
    '.lz4': 'lz4',
    '.lzma': 'lzma',
    '.lzo': 'lzop',
    '.xz': 'xz',
    '.zst': 'zstd',
}
_ARCHIVES = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.lzma')
_MEMBER = 'composer_states.pt'


@contextlib.contextmanager
def uncompressed(path: Path) -> Iterator[Path]:
    """Holds a file uncompressed in a temporary place; anything else is left where it is.

    What has been mapped into memory outlives the temporary file.

    Raises:
        ValueError: If it cannot be uncompressed.
    """
    # Composer's link to the latest checkpoint has another extension than that. A store of contents has none.
    named = path.resolve() if path.resolve().suffix else path
    is_archive = named.name.endswith(_ARCHIVES)
    if not path.is_file() or not (is_archive or (named.suffix in _PROGRAMS and named.stem.endswith('.pt'))):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / _MEMBER
        with target.open('wb') as file:
            if is_archive:
                _extract(path, file)
            else:
                _decompress(path, _PROGRAMS[named.suffix], file)
        yield target


def _decompress(path: Path, program: str, file: IO[bytes]) -> None:
    try:
        done = subprocess.run(
            [program, '-dc', str(path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            check=False,
        )
    except FileNotFoundError as error:
        raise ValueError(
            f"'{path}' is compressed, and the program '{program}' to uncompress it is not installed."
        ) from error
    if done.returncode:
        reason = ' '.join(done.stderr.decode(errors='replace').split())
        raise ValueError(f"'{path}' cannot be uncompressed: {reason}.")


def _extract(path: Path, file: IO[bytes]) -> None:
    try:
        with tarfile.open(path) as archive:
            member = archive.extractfile(f'./{_MEMBER}' if f'./{_MEMBER}' in archive.getnames() else _MEMBER)
            if member is None:
                raise KeyError(_MEMBER)
            shutil.copyfileobj(member, file)
    except Exception as error:
        # Damaged archives raise errors of tarfile, of zlib and its peers, EOFError and OSError.
        raise ValueError(f"'{path}' cannot be unpacked: {' '.join(str(error).split())}.") from error
