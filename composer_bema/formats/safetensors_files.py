# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Safetensors files, and their index, filled piece by piece.

The library's own writer wants all tensors of a file in memory at once. The format allows for less: a header that says
where each tensor lies, and then their bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from composer_bema.formats.tensors import TensorSpec

__all__ = ['DTYPES', 'MAX_SHARD_SIZE', 'SafetensorsFiles', 'bytes_of', 'write_json']

MAX_SHARD_SIZE = '5GB'
_SIZE = re.compile(r'([0-9]+(?:\.[0-9]+)?) *([KMGT]?B)?', re.IGNORECASE)
_UNITS = {'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12}

# Dtypes by what the format calls them, https://github.com/huggingface/safetensors#format.
DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'F8_E4M3': torch.float8_e4m3fn,
    'F8_E4M3FNUZ': torch.float8_e4m3fnuz,
    'F8_E5M2': torch.float8_e5m2,
    'F8_E5M2FNUZ': torch.float8_e5m2fnuz,
    'C64': torch.complex64,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U64': torch.uint64,
    'U32': torch.uint32,
    'U16': torch.uint16,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Place(NamedTuple):
    file: str
    offset: int


class SafetensorsFiles:
    """The weights of a Hugging Face folder: one file, or several and their index.

    Several processes may each write its share, after one of them has called :meth:`create`.

    Args:
        folder (Path): Where they are.
        specs (Mapping[str, TensorSpec]): The tensors by name.
        stem (str): The name of the file without its extension. Default: ``'model'``.
        max_shard_size (int | str, optional): The bytes at which another file begins, or a text such as ``'5GB'``; None
            writes one.

    Raises:
        ValueError: If a dtype is none that the format has, or the size cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        stem: str = 'model',
        max_shard_size: Optional[Union[int, str]] = MAX_SHARD_SIZE,
    ) -> None:
        for name, spec in specs.items():
            if spec.dtype not in _NAMES:
                raise ValueError(f"Safetensors cannot hold the tensor '{name}', whose dtype is {spec.dtype}.")
        self._folder = folder
        self._specs = specs
        self._stem = stem
        whole = sum(spec.nbytes for spec in specs.values())
        self._split = split_torch_state_dict_into_shards(
            {name: torch.empty(spec.shape, dtype=spec.dtype, device='meta') for name, spec in specs.items()},
            filename_pattern=f'{stem}{{suffix}}.safetensors',
            max_shard_size=whole if max_shard_size is None else _size_in_bytes(max_shard_size),
        )
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, _Place] = {}
        for file, names in self._split.filename_to_tensors.items():
            # Wide ones first: every tensor then begins where its dtype may.
            self._lay_out(file, sorted(names, key=lambda name: -specs[name].dtype.itemsize))
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()

    def create(self) -> None:
        """Makes the files, with headers and zeros, and their index if there are several."""
        for file, header in self._headers.items():
            names = self._split.filename_to_tensors[file]
            with _named(self._folder / file), (self._folder / file).open('wb') as opened:
                opened.write(header)
                opened.truncate(len(header) + sum(self._specs[name].nbytes for name in names))
        if self._split.is_sharded:
            index = {'metadata': self._split.metadata, 'weight_map': self._split.tensor_to_filename}
            write_json(self._folder / f'{self._stem}.safetensors.index.json', index)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Writes values into a tensor from the element ``start`` on; threads may do so at the same time.

        Raises:
            OSError: If the file cannot be written, such as on a full disk; it is named.
            ValueError: If a number is too large for the tensor's dtype.
        """
        place, spec = self._places[name], self._specs[name]
        rounded = values.to(spec.dtype)
        if _is_narrower(spec.dtype, values.dtype) and _overflows(values, rounded):
            raise ValueError(
                f"Values of the tensor '{name}' are too large for {spec.dtype}: write it in another dtype."
            )
        content = bytes_of(rounded)
        offset = place.offset + start * spec.dtype.itemsize
        with _named(self._folder / place.file):
            while content:
                written = os.pwrite(self._descriptor(place.file), content, offset)
                content, offset = content[written:], offset + written

    def close(self) -> None:
        """Closes the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _lay_out(self, file: str, names: list[str]) -> None:
        entries, end = {}, 0
        for name in names:
            spec = self._specs[name]
            span = [end, end + spec.nbytes]
            entries[name] = {'dtype': _NAMES[spec.dtype], 'shape': list(spec.shape), 'data_offsets': span}
            end = span[1]
        text = json.dumps({'__metadata__': {'format': 'pt'}, **entries}).encode()
        text += b' ' * (-len(text) % 8)
        header = self._headers[file] = len(text).to_bytes(8, 'little') + text
        self._places.update({n: _Place(file, len(header) + entries[n]['data_offsets'][0]) for n in names})

    def _descriptor(self, file: str) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._folder / file, os.O_WRONLY)
            return self._descriptors[file]


def _is_narrower(dtype: torch.dtype, source: torch.dtype) -> bool:
    both = dtype.is_floating_point and source.is_floating_point
    return both and torch.finfo(dtype).max < torch.finfo(source).max


def _size_in_bytes(size: Union[int, str]) -> int:
    match = _SIZE.fullmatch(str(size).strip())
    nbytes = 0 if match is None else int(float(match[1]) * _UNITS[(match[2] or 'B').upper()])
    if nbytes < 1:
        raise ValueError(f"max_shard_size must be a number of bytes or a text such as '5GB', but is {size!r}.")
    return nbytes


def _overflows(values: torch.Tensor, rounded: torch.Tensor) -> bool:
    # A sum is finite unless a value is not.
    if rounded.sum(dtype=torch.float32).isfinite():
        return False
    # Not all dtypes of eight bits can be asked.
    return bool((values.isfinite() & ~rounded.float().isfinite()).any())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file in errors of writing to it, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def bytes_of(values: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, sharing its memory."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def write_json(path: Path, content: object) -> None:
    """Writes what people may want to read, too."""
    with _named(path):
        path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')
