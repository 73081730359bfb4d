# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Sharded checkpoints: a folder of torch's distributed checkpoint, read item by item.

``.metadata`` says of what the checkpoint is made, and which bytes of which file are which part of it. torch's own
loader unpickles whatever it finds, and this one executes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from composer_bema.formats.harmless import is_file_name
from composer_bema.formats.stored_parts import StoredPart
from composer_bema.formats.tensors import LazyTensor, piece_memory
from composer_bema.formats.unpickling import load_metadata

__all__ = ['METADATA', 'LazyValue', 'plain', 'read_folder', 'read_model', 'stored_parts']

METADATA = '.metadata'

_NO_WHOLE = "its .metadata has '{}' in parts that do not make up the whole"

# What trainers call their model's state.
_MODELS = ('model', 'model_state_dict', 'state_dict')


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
            if not is_file_name(part.file) or min(part.offset, part.length) < 0:
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


def read_model(folder: Path) -> dict[str, LazyTensor]:
    """Returns the tensors that a folder has of a model, as trainers other than Composer leave them.

    They are those under ``model``, ``model_state_dict`` or ``state_dict``, or all if nothing but tensors was saved.
    Names in nested dicts are joined by dots.

    Raises:
        ValueError: If the metadata is damaged, or of another kind, or it is not said what is the model's.
    """
    nest = read_folder(folder)
    models = [nest[name] for name in _MODELS if isinstance(nest.get(name), Mapping)]
    if not models and not all(isinstance(value, LazyTensor) for value in nest.values()):
        raise ValueError(f'it holds {", ".join(map(str, nest))}, and no {" or ".join(_MODELS)}')
    return dict(_tensors(models[0] if models else nest))


def _tensors(nest: Mapping[Any, Any], prefix: str = '') -> Iterator[tuple[str, LazyTensor]]:
    for name, value in nest.items():
        if isinstance(value, LazyTensor):
            yield f'{prefix}{name}', value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f'{prefix}{name}.')


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
        raise ValueError(_NO_WHOLE.format(key))
    # torch leaves the place out of the index of a tensor that is whole.
    located = [_Chunk(o, sizes, parts.get((key, o)) or parts[key, ()]) for o, sizes in chunks]
    read = functools.partial(_assemble, folder, key, shape, dtype, located)
    rows = _in_rows(shape, located)
    if rows is None and _overlap(located):
        raise ValueError(_NO_WHOLE.format(key))
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


def _overlap(chunks: list[_Chunk]) -> bool:
    """Returns whether any two parts of a tensor have a value in common."""
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    begins = torch.tensor([chunk.offsets for chunk in filled])
    ends = begins + torch.tensor([chunk.sizes for chunk in filled])
    # One with all that follow: of a tensor that is cut along two axes there may be thousands.
    meet = (((begins[i + 1 :] < ends[i]) & (begins[i] < ends[i + 1 :])).all(dim=1).any() for i in range(len(filled)))
    return any(meet)


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
