# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Unpickling that executes nothing: what ``torch.save`` has written, and the metadata of a sharded checkpoint.

A pickle names functions and classes and has them called. Here the names lead to torch's own list of harmless ones, or
to objects that swallow whatever they are given.
"""

from __future__ import annotations

import datetime
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, Union

import torch

__all__ = ['Inert', 'Record', 'archive_problem', 'load_archive', 'load_metadata']

# The classes of a sharded checkpoint's metadata, and their modules.
_RECORDS = {
    **dict.fromkeys(
        (
            'BytesStorageMetadata',
            'ChunkStorageMetadata',
            'Metadata',
            'MetadataIndex',
            'StorageMeta',
            'TensorProperties',
            'TensorStorageMetadata',
            '_MEM_FORMAT_ENCODING',
        ),
        'torch.distributed.checkpoint.metadata',
    ),
    '_StorageInfo': 'torch.distributed.checkpoint.filesystem',
    '_get_layout': 'torch.serialization',
}
# Where the checkpoint was written to.
_PATHS = ('PosixPath', 'WindowsPath', 'PurePosixPath', 'PureWindowsPath')
# A checkpoint of Composer has the time that its run has taken.
_SAFE: list[Any] = [datetime.timedelta]
_CHUNK = 1 << 20


class Inert:
    """Stands for an object of some class, or for a function, and does nothing: nobody here asks for its values."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Record:
    """Stands for an object of a sharded checkpoint's metadata: its attributes, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def archive_problem(source: Union[Path, bytes]) -> str:
    """Returns what is wrong with what ``torch.save`` has written, or ''.

    Of a file only the directory and the pickle are read. The tensors' bytes are checked in what is in memory already.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            records = archive.infolist()
            # The directory of the archive comes last, so that all that it lists lies before it.
            fits = all(r.header_offset + r.compress_size <= archive.start_dir for r in records)
            pickles = [r for r in records if r.filename.endswith('/data.pkl')]
            if not fits or len(pickles) != 1:
                return 'its directory does not fit its content'
            for record in records if isinstance(source, bytes) else pickles:
                _check_sum(archive, record)
    except OSError:
        raise
    except Exception as error:
        # Of damaged bytes zipfile makes BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError and others.
        if 'not a zip file' in str(error):
            return 'its end is missing, or it is another kind of file'
        return f'its records are damaged: {_one_line(error)}'
    return ''


def _check_sum(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    # It stays at zero when torch is told to compute none.
    if record.CRC:
        with archive.open(record) as file:
            while file.read(_CHUNK):
                pass


def load_archive(source: Union[Path, bytes]) -> Any:
    """Returns what ``torch.save`` has put into a file, which is mapped into memory rather than read, or into bytes.

    Objects that are neither tensors nor plain values come back as `Inert`.

    Raises:
        ValueError: If it is damaged or cut, or nothing that ``torch.save`` has written.
    """
    problem = archive_problem(source)
    if problem:
        raise ValueError(problem)
    try:
        try:
            return _load_weights_only(source)
        except pickle.UnpicklingError:
            with torch.serialization.safe_globals(_SAFE):
                # Of two classes for one name torch would take either.
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(_file(source))
            with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
                return _load_weights_only(source)
    except OSError:
        raise
    except Exception as error:
        # torch makes RuntimeError, KeyError, TypeError, ... of what it does not expect.
        raise ValueError(f'it cannot be unpickled: {_one_line(error)}') from error


def load_metadata(path: Path) -> Any:
    """Returns the metadata of a sharded checkpoint, of `Record` objects, tuples, dicts, lists and plain values.

    Raises:
        ValueError: If it is damaged or cut, or no such metadata.
    """
    content = path.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # Damaged bytes can be any sequence of instructions, and raise anything.
        raise ValueError(f'its .metadata cannot be unpickled: {_one_line(error)}') from error
    if type(metadata).__name__ != 'Metadata':
        raise ValueError('its .metadata is of another kind')
    return metadata


# The one written in Python: a damaged index into its memo costs an entry of a dict, and in C an array of that size.
class _MetadataUnpickler(pickle._Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # Of this load alone, since instructions can set their attributes.
        self._classes = {name: type(name, (Record,), {}) for name in (*_RECORDS, *_PATHS)}

    def find_class(self, module: str, name: str) -> Any:
        if _RECORDS.get(name) == module or (name in _PATHS and module.startswith('pathlib')):
            return self._classes[name]
        if (module, name) == ('torch', 'Size'):
            return tuple
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no such metadata needs')


def _load_weights_only(source: Union[Path, bytes]) -> Any:
    with torch.serialization.safe_globals(_SAFE):
        return torch.load(_file(source), map_location='cpu', weights_only=True, mmap=isinstance(source, Path))


def _file(source: Union[Path, bytes]) -> Union[str, io.BytesIO]:
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def _one_line(error: BaseException) -> str:
    # torch wraps what went wrong in advice to read the file with weights_only=False, which is no advice.
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        error = error.__context__
    text = ' '.join(str(error).split()) or type(error).__name__
    return text.split('. ')[0].rstrip('.:')
