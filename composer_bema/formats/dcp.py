# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Sharded checkpoints: a folder of torch's distributed checkpoint, read item by item.

``.metadata`` says of what the checkpoint is made, and which bytes of which file are which part of it. Every part is
what ``torch.save`` writes. torch's own loader unpickles whatever it finds, and this one executes nothing. It reads a
part at once, or the values in it a few at a time.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional

import torch

from composer_bema.formats.tensors import LazyTensor, piece_memory
from composer_bema.formats.unpickling import load_archive, load_metadata

__all__ = ['METADATA', 'LazyValue', 'StoredPart', 'StoredTensor', 'plain', 'read_folder', 'stored_parts']

METADATA = '.metadata'

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


@dataclass(frozen=True)
class LazyValue:
    """Something of a checkpoint that is no tensor, and is unpickled when it is asked for."""

    folder: Path
    part: StoredPart

    def read(self) -> Any:
        """Returns it."""
        return self.part.load(self.folder)


def stored_parts(metadata: Any) -> dict[tuple[str, tuple[int, ...]], StoredPart]:
    """Returns where everything is, by its key and by its place in the tensor that it is a part of.

    Raises:
        ValueError: If the metadata is not what torch's distributed checkpoint writes into a folder.
    """
    parts = {}
    try:
        for index, info in metadata.storage_data.items():
            if getattr(info, 'transform_descriptors', None):
                raise ValueError(f'its {index.fqn} was written through {info.transform_descriptors}, which is not read')
            part = StoredPart(info.relative_path, info.offset, info.length)
            if Path(part.file).name != part.file or min(part.offset, part.length) < 0:
                raise ValueError(f"its .metadata names the file '{part.file}', which is not in the folder")
            parts[index.fqn, tuple(getattr(index, 'offset', None) or ())] = part
    except (AttributeError, TypeError) as error:
        raise ValueError('its .metadata does not say where its tensors are') from error
    return parts


def read_folder(folder: Path) -> dict[Any, Any]:
    """Returns the nest of dicts that was saved, with a `LazyTensor` for each tensor and a `LazyValue` for all else.

    Lists that held tensors or dicts are dicts by index, and what was empty is missing.

    Raises:
        ValueError: If the metadata is damaged, or of another kind.
    """
    metadata = load_metadata(folder / METADATA)
    parts = stored_parts(metadata)
    nest: dict[Any, Any] = {}
    try:
        for key, stored in metadata.state_dict_metadata.items():
            path = metadata.planner_data[key]
            if '.'.join(map(str, path)) != key:
                raise KeyError(key)
            *parents, name = path
            place = nest
            for parent in parents:
                place = place.setdefault(parent, {})
            is_tensor = hasattr(stored, 'chunks')
            place[name] = _lazy_tensor(folder, key, stored, parts) if is_tensor else LazyValue(folder, parts[key, ()])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'its .metadata contradicts itself ({type(error).__name__}: {error})') from error
    return nest


def plain(nest: Any) -> Any:
    """Returns a nest of dicts with all that is not a tensor read, and with lists where lists were saved."""
    if isinstance(nest, LazyValue):
        return nest.read()
    if isinstance(nest, list):
        return [plain(value) for value in nest]
    if not isinstance(nest, Mapping):
        return nest
    values = {key: plain(value) for key, value in nest.items()}
    is_list = bool(values) and all(isinstance(key, int) for key in values)
    return [values[index] for index in sorted(values)] if is_list else values


def _lazy_tensor(folder: Path, key: str, stored: Any, parts: Mapping[Any, StoredPart]) -> LazyTensor:
    shape, dtype = torch.Size(stored.size), stored.properties.state[0]
    chunks = [(tuple(chunk.offsets), torch.Size(chunk.sizes)) for chunk in stored.chunks]
    fit = all(
        len(offsets) == len(sizes) == len(shape)
        and all(o >= 0 and o + s <= whole for o, s, whole in zip(offsets, sizes, shape, strict=True))
        for offsets, sizes in chunks
    )
    if not fit or sum(math.prod(sizes) for _, sizes in chunks) != math.prod(shape):
        raise ValueError(f"its .metadata has '{key}' in parts that do not make up the whole")
    # torch leaves the place out of the index of a tensor that is whole.
    located = [_Chunk(o, sizes, parts.get((key, o)) or parts[key, ()]) for o, sizes in chunks]
    read = functools.partial(_assemble, folder, key, shape, dtype, located)
    rows = _in_rows(shape, located)
    stream = None if rows is None else functools.partial(_stream, folder, key, dtype, rows, read)
    return LazyTensor(shape, dtype, read, stream)


class _Chunk(NamedTuple):
    """A part of a tensor: the place of its first value, its shape, and its bytes."""

    offsets: tuple[int, ...]
    sizes: torch.Size
    part: StoredPart


def _assemble(folder: Path, key: str, shape: torch.Size, dtype: torch.dtype, chunks: list[_Chunk]) -> torch.Tensor:
    """Reads the parts of a tensor and puts them together; one that is whole is not copied."""
    whole = None
    for offsets, sizes, part in chunks:
        tensor = part.load(folder)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != sizes or tensor.dtype != dtype:
            raise _another(folder, key, part)
        if sizes == shape:
            return tensor
        whole = torch.empty(shape, dtype=dtype) if whole is None else whole
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = tensor
    return torch.empty(shape, dtype=dtype) if whole is None else whole


def _another(folder: Path, key: str, part: StoredPart) -> ValueError:
    return ValueError(f"'{folder / part.file}' has something else where '{key}' should be; use another checkpoint.")


def _in_rows(shape: torch.Size, chunks: list[_Chunk]) -> Optional[list[_Chunk]]:
    """Returns parts that are ranges of rows, in the order of the rows, or None if they are others."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.offsets[:1], chunk.sizes[:1]))
    row = 0
    for offsets, sizes, _ in ordered:
        if sizes[1:] != shape[1:] or offsets[:1] not in ((), (row,)):
            return None
        row += sum(sizes[:1])
    return ordered


def _stream(
    folder: Path,
    key: str,
    dtype: torch.dtype,
    rows: list[_Chunk],
    read: Callable[[], torch.Tensor],
    size: int,
    memory: Optional[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Yields the values of parts that follow each other, ``size`` at a time wherever the parts are cut."""
    tensors = []
    for _, sizes, part in rows:
        tensor = part.tensor(folder)
        if tensor is None:
            yield from read().reshape(-1).split(size)
            return
        if tensor.shape != sizes or tensor.dtype != dtype:
            raise _another(folder, key, part)
        tensors.append(tensor)
    left = sum(tensor.shape.numel() for tensor in tensors)
    values = piece_memory(min(size, left), dtype, memory)
    piece, filled = values, 0
    for tensor in tensors:
        in_part = tensor.shape.numel()
        while in_part:
            if filled == len(piece):
                yield piece
                left -= filled
                piece, filled = values[:left], 0
            count = min(in_part, len(piece) - filled)
            tensor.read_into(piece[filled : filled + count])
            in_part -= count
            filled += count
    yield piece


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
