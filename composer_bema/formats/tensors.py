# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tensors of a checkpoint that are read when they are asked for, whole or piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

from composer_bema.averaging.digests import add_digests, digest

__all__ = ['DTYPE_NAMES', 'LazyTensor', 'TensorSpec', 'dtype_named', 'main_dtype', 'piece_memory']

# What weights can be written in.
DTYPE_NAMES = ('float32', 'bfloat16', 'float16', 'float64')

# Elements that are compared at a time.
_COMPARED = 64 * 1024


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by its shape and dtype, and read by calling ``read`` or ``pieces``.

    Without a ``stream`` of its own its pieces are views of what ``read`` returns, which is as good where a file is
    mapped into memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    stream: Optional[Callable[[int, Optional[torch.Tensor]], Iterator[torch.Tensor]]] = None

    @property
    def spec(self) -> TensorSpec:
        """What is known of it unread."""
        return TensorSpec(self.shape, self.dtype)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """Returns one that needs no reading."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    def pieces(self, size: int, memory: Optional[torch.Tensor] = None) -> Iterator[torch.Tensor]:
        """Yields the values in row-major order, ``size`` of them at a time.

        A piece is not to be written to, and is there until the next one is asked for.

        Args:
            size (int): The elements of a piece; the last may have fewer.
            memory (torch.Tensor, optional): Bytes that a piece may be read into, at least 16 for each element.
        """
        if self.stream is not None:
            return self.stream(size, memory)
        return iter(self.read().reshape(-1).split(size))

    def equals(self, other: LazyTensor) -> bool:
        """Returns whether the other has the same shape, dtype and values; the first that differ end the reading."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        pieces = zip(self.pieces(_COMPARED), other.pieces(_COMPARED), strict=True)
        return all(torch.equal(a, b) for a, b in pieces)

    def is_constant(self) -> bool:
        """Returns whether all values are the same; the first that differs ends the reading."""
        first = next(self.pieces(_COMPARED))[:1].clone()
        return all(torch.equal(piece, first.expand_as(piece)) for piece in self.pieces(_COMPARED))

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """Returns it in another dtype; what is no floating-point number stays as it is."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(
            self.shape,
            dtype,
            lambda: self.read().to(dtype),
            lambda size, memory: (piece.to(dtype) for piece in self.pieces(size, memory)),
        )

    def reshape(self, shape: torch.Size) -> LazyTensor:
        """Returns it in another shape of as many elements."""
        if shape == self.shape:
            return self
        return LazyTensor(shape, self.dtype, lambda: self.read().reshape(shape), self.stream)

    def checked(self, expected: int, complaint: str) -> LazyTensor:
        """Returns it with a check of its digest: reading other values raises a ``ValueError`` of ``complaint``.

        Of one that is read piece by piece this is known after the last piece.
        """

        def read() -> torch.Tensor:
            tensor = self.read()
            if digest(tensor) != expected:
                raise ValueError(complaint)
            return tensor

        def stream(size: int, memory: Optional[torch.Tensor]) -> Iterator[torch.Tensor]:
            found, start = 0, 0
            for piece in self.pieces(size, memory):
                found = add_digests(found, digest(piece, start))
                start += piece.numel()
                yield piece
            if found != expected:
                raise ValueError(complaint)

        return LazyTensor(self.shape, self.dtype, read, stream)


def main_dtype(specs: Iterable[TensorSpec]) -> Optional[torch.dtype]:
    """Returns the floating-point dtype that most elements have: a model may keep a few tensors in another one."""
    elements: Counter[torch.dtype] = Counter()
    for spec in specs:
        if spec.dtype.is_floating_point:
            elements[spec.dtype] += spec.shape.numel()
    return max(elements, key=lambda dtype: elements[dtype], default=None)


def dtype_named(name: Optional[str], setting: str) -> Optional[torch.dtype]:
    """Returns a dtype that weights are written in; None for None.

    Args:
        name (str, optional): Its name, such as ``'bfloat16'``.
        setting (str): What the name was given as, for messages.

    Raises:
        ValueError: If it is none of `DTYPE_NAMES`.
    """
    if name is None:
        return None
    if name not in DTYPE_NAMES:
        raise ValueError(f'{setting} must be one of {", ".join(DTYPE_NAMES)}, not {name!r}.')
    return getattr(torch, name)


def piece_memory(length: int, dtype: torch.dtype, memory: Optional[torch.Tensor]) -> torch.Tensor:
    """Returns memory for all pieces of a tensor: fresh memory for each would cost as much as reading it.

    Args:
        length (int): The elements of a piece.
        dtype (torch.dtype): The tensor's.
        memory (torch.Tensor, optional): The bytes to take, if there are some.
    """
    if memory is None:
        return torch.empty(length, dtype=dtype)
    return memory[: length * dtype.itemsize].view(dtype)
