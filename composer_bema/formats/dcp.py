# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Sharded checkpoints: a folder of torch's distributed checkpoint, read item by item.

``.metadata`` says of what the checkpoint is made, and which bytes of which file are which part of it. Every part is
what ``torch.save`` writes. torch's own loader unpickles whatever it finds, and this one executes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from composer_bema.formats.tensors import LazyTensor
from composer_bema.formats.unpickling import load_archive, load_metadata

__all__ = ['METADATA', 'LazyValue', 'StoredPart', 'plain', 'read_folder', 'stored_parts']

METADATA = '.metadata'


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
            raise ValueError(f"'{path}' is damaged at byte {self.offset} ({error}); use another checkpoint.") from error


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
    located = [(o, sizes, parts.get((key, o)) or parts[key, ()]) for o, sizes in chunks]
    return LazyTensor(shape, dtype, functools.partial(_assemble, folder, key, shape, dtype, located))


def _assemble(folder: Path, key: str, shape: torch.Size, dtype: torch.dtype, chunks: list[Any]) -> torch.Tensor:
    """Reads the parts of a tensor and puts them together; one that is whole is not copied."""
    whole = None
    for offsets, sizes, part in chunks:
        tensor = part.load(folder)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != sizes or tensor.dtype != dtype:
            raise ValueError(
                f"'{folder / part.file}' has something else where '{key}' should be; use another checkpoint."
            )
        if sizes == shape:
            return tensor
        whole = torch.empty(shape, dtype=dtype) if whole is None else whole
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = tensor
    return torch.empty(shape, dtype=dtype) if whole is None else whole
