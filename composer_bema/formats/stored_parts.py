# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Parts of a sharded checkpoint: ranges of files, each of which is what ``torch.save`` has written.

A part is unpickled at once, or its tensor is located in it, and the values are read some at a time. Neither executes
anything that is found there.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional

import torch

from composer_bema.formats.unpickling import load_archive

__all__ = ['StoredPart', 'StoredTensor']

# The header in front of each record of an archive; its last two numbers are the lengths of what follows it.
_RECORD_HEADER = struct.Struct('<4s22xHH')


@dataclass(frozen=True)
class StoredPart:
    """The bytes of one part of a checkpoint: a range of a file in its folder."""

    file: str
    offset: int
    length: int

    def load(self, folder: Path) -> Any:
        """Returns what they hold.

        Raises:
            ValueError: If they are damaged.
        """
        path = folder / self.file
        with path.open('rb') as file:
            file.seek(self.offset)
            content = file.read(self.length)
        try:
            return load_archive(content)
        except ValueError as error:
            raise self.damage(folder, str(error)) from error

    def tensor(self, folder: Path) -> Optional[StoredTensor]:
        """Returns the tensor that they hold, its values unread.

        None stands for anything but a tensor whose values are there in row-major order, and for damage: `load` can
        tell these apart.
        """
        with (folder / self.file).open('rb') as file:
            try:
                return _locate(folder, self, file)
            except OSError:
                raise
            except Exception:
                # Damaged bytes make zipfile, pickle and torch raise anything.
                return None

    def damage(self, folder: Path, problem: str) -> ValueError:
        """Returns an error that says where the bytes are, and what is wrong with them."""
        path = folder / self.file
        return ValueError(f"'{path}' is damaged at byte {self.offset} ({problem}); use another checkpoint.")


class StoredTensor:
    """A tensor of a part, whose values are read from first to last, some at a time, and checked when all are read.

    They are read and not mapped into memory: hardly any are aligned in the file, so that they would be copied anyway.
    The file is open only while values are read, since those of many checkpoints may be in use.

    Args:
        folder (Path): The checkpoint.
        part (StoredPart): Where it is in there.
        layout (_Layout): What it is, apart from its values.
        start (int): The byte in the part at which its values begin.
        record (ZipInfo): The part's record of them.
    """

    def __init__(self, folder: Path, part: StoredPart, layout: _Layout, start: int, record: zipfile.ZipInfo) -> None:
        self.shape = layout.shape
        self.dtype = layout.dtype
        self._folder = folder
        self._part = part
        self._start = start
        self._record = record
        self._bytes_read = 0
        self._sum = 0

    def read_into(self, values: torch.Tensor) -> None:
        """Fills a contiguous tensor of at least one value with those that come next.

        Raises:
            ValueError: If the file is cut, or the last value is read and not all are what was written.
        """
        content = values.view(torch.uint8).numpy().data
        with (self._folder / self._part.file).open('rb') as file:
            file.seek(self._part.offset + self._start + self._bytes_read)
            if file.readinto(content) < len(content):
                raise self._part.damage(self._folder, 'its end is missing')
        self._bytes_read += len(content)
        self._sum = zlib.crc32(content, self._sum)
        # It stays at zero when torch is told to compute none.
        if self._bytes_read == self._record.file_size and self._record.CRC not in (0, self._sum):
            problem = f'its records are damaged: Bad CRC-32 for file {self._record.filename!r}'
            raise self._part.damage(self._folder, problem)


def _locate(folder: Path, part: StoredPart, file: IO[bytes]) -> Optional[StoredTensor]:
    """Finds the values of a tensor in the archive of a part, of which all but the values is read and checked."""
    archive = _Range(file, part.offset, part.length)
    records = {record.filename.partition('/')[2]: record for record in zipfile.ZipFile(archive).infolist()}
    layout = _LayoutUnpickler(io.BytesIO(_content(archive, records['data.pkl']))).load()
    values = records.pop(f'data/{layout.key}')
    contents = {name: _content(archive, record) for name, record in records.items()}
    start, numel = _start(archive, values), layout.shape.numel()
    is_plain = (
        layout.offset == 0
        and not layout.has_flags
        and torch.empty_strided(layout.shape, layout.stride, device='meta').is_contiguous()
        and contents.get('byteorder', b'little') == sys.byteorder.encode()
        and numel * layout.dtype.itemsize == values.file_size == values.compress_size
        and start + values.file_size <= part.length
    )
    return StoredTensor(folder, part, layout, start, values) if is_plain else None


def _content(archive: _Range, record: zipfile.ZipInfo) -> bytes:
    archive.seek(_start(archive, record))
    content = archive.read(record.file_size)
    if len(content) < record.file_size or record.CRC not in (0, zlib.crc32(content)):
        raise zipfile.BadZipFile(record.filename)
    return content


def _start(archive: _Range, record: zipfile.ZipInfo) -> int:
    """Returns the byte of an archive at which the content of a record begins."""
    archive.seek(record.header_offset)
    magic, name_length, extra_length = _RECORD_HEADER.unpack(archive.read(_RECORD_HEADER.size))
    if magic != b'PK\3\4' or record.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(record.filename)
    return record.header_offset + _RECORD_HEADER.size + name_length + extra_length


class _Range(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._length = length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if position < 0:
            raise ValueError('there is nothing before the range')
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content


class _Layout(NamedTuple):
    """A tensor without its values: the key of the record of these, and which of them are where in the tensor."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    # Such as that all values are to be negated.
    has_flags: bool


# The one written in Python, for the reason that `unpickling` gives for metadata.
class _LayoutUnpickler(pickle._Unpickler):
    """Reads what ``torch.save`` pickles of a tensor into a `_Layout`."""

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, storage, key, _, _ = pid
        return key, storage

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch._utils' and name in ('_rebuild_tensor_v2', '_rebuild_tensor_v3'):
            # A new function each time, since instructions can set its attributes.
            return lambda *args: _layout(name, *args)
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ('torch', 'torch.storage') and name.endswith('Storage'):
            return name
        raise pickle.UnpicklingError(f'{module}.{name}')


def _layout(
    function: str,
    storage: tuple[str, str],
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    *others: Any,
) -> _Layout:
    """Takes the arguments of torch's functions that rebuild a tensor, of which the newer one is told the dtype too."""
    key, kind = storage
    if function == '_rebuild_tensor_v3':
        dtype, *flags = others
    else:
        dtype, flags = torch.serialization.StorageType(kind).dtype, others
    return _Layout(key, dtype, offset, torch.Size(shape), stride, any(flags))
