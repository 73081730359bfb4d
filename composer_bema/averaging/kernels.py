# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How a `LinearStep` meets memory: lists of tensors combined in place, chunk by chunk, in one pass.

A chunk is small enough that the operands of all rows of a step stay in cache, so that an update costs its memory
traffic, and no temporary is larger than a chunk. Operands of another dtype or device than the target's are converted
chunk by chunk on the way. Chunks in host memory are shared out among threads.
"""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Optional, TypeVar

import torch

from composer_bema.averaging.rules import THETA, Difference, Lerp, LinearStep, Row
from composer_bema.averaging.threads import share_out

__all__ = ['apply_step', 'distance', 'exchange', 'first_nonfinite', 'is_exact_in']

# Elements a chunk. Five fp32 operands of this size fit into the cache of one core cluster; an accelerator wants fewer,
# larger launches.
_CPU_CHUNK = 256 * 1024
_ACCELERATOR_CHUNK = 16 * 1024 * 1024
# A thread takes about as long to start as one chunk does.
_CHUNKS_A_THREAD = 4

_Chunks = tuple[torch.Tensor, ...]
Result = TypeVar('Result')


@torch.no_grad()
def apply_step(step: LinearStep, theta: Sequence[torch.Tensor], buffers: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Applies the rows of ``step`` to every tensor, in place.

    Args:
        step (LinearStep): The rows.
        theta (Sequence[torch.Tensor]): The training weights, of any shape, dtype and device. They are only read.
        buffers (Mapping[str, Sequence[torch.Tensor]]): For each buffer that the rows name, tensors of the shapes of
            ``theta``, in the same order.
    """
    names = [THETA, *buffers]

    def combine(chunks: _Chunks, scratch: _Scratch) -> None:
        operands = dict(zip(names, chunks, strict=True))
        for row in step.rows:
            _apply_row(row, operands, scratch)

    _for_each_chunk(combine, list(zip(theta, *buffers.values(), strict=True)))


@torch.no_grad()
def exchange(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    """Exchanges the values of two lists of tensors that agree in shape, dtype and device, bit for bit."""

    def trade(chunks: _Chunks, scratch: _Scratch) -> None:
        a, b = chunks
        a_values = scratch.take('exchange', a).copy_(a)
        a.copy_(b)
        b.copy_(a_values)

    _for_each_chunk(trade, list(zip(left, right, strict=True)))


@torch.no_grad()
def distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Returns the Euclidean distance between two lists of tensors of the same shapes, in the weights' unit."""

    def square(chunks: _Chunks, scratch: _Scratch) -> torch.Tensor:
        a, b = chunks
        difference = torch.sub(scratch.like(b, a, 'left'), b, out=scratch.take('(difference)', b))
        return torch.linalg.vector_norm(difference).float().square()

    squares = _for_each_chunk(square, list(zip(left, right, strict=True)))
    return math.sqrt(sum(torch.stack(squares).tolist())) if squares else 0.0


@torch.no_grad()
def first_nonfinite(tensors: Sequence[torch.Tensor]) -> Optional[int]:
    """Returns the index of the first tensor that holds a NaN or an infinity, or None.

    One read of the values: a sum is finite unless a value is not (or the sum overflows, so a suspect is looked at
    closely). It has to come before an update and not ride on it, or the chunks before the bad one would be updated.
    """

    def add_up(chunks: _Chunks, scratch: _Scratch) -> torch.Tensor:
        (chunk,) = chunks
        return chunk.sum(dtype=_sum_dtype(chunk))

    sums = _to_host(_for_each_chunk(add_up, [(tensor,) for tensor in tensors]))
    owners = (i for i, tensor in enumerate(tensors) for _ in _aligned_chunks((tensor,)))
    suspects = dict.fromkeys(i for i, value in zip(owners, sums, strict=True) if not cmath.isfinite(value))
    return next((i for i in suspects if not _is_finite(tensors[i])), None)


@torch.no_grad()
def is_exact_in(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether every value of ``tensor`` survives a round trip through ``dtype``."""
    return all(torch.equal(chunk, chunk.to(dtype).to(chunk.dtype)) for (chunk,) in _aligned_chunks((tensor,)))


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(chunk).all()) for (chunk,) in _aligned_chunks((tensor,)))


class _Scratch:
    """Chunk-sized temporaries, allocated once a pass and handed out again for every chunk."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, role: str, like: torch.Tensor) -> torch.Tensor:
        """Returns uninitialised memory of the shape, dtype and device of ``like``, one per role."""
        key = (role, like.dtype, like.device)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < like.numel():
            memory = self._memory[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return memory[: like.numel()].view(like.shape)

    def like(self, target: torch.Tensor, operand: torch.Tensor, role: str) -> torch.Tensor:
        """Returns ``operand`` in the dtype and on the device of ``target``."""
        if operand.dtype == target.dtype and operand.device == target.device:
            return operand
        return self.take(role, target).copy_(operand)


def _for_each_chunk(function: Callable[[_Chunks, _Scratch], Result], tuples: Sequence[_Chunks]) -> list[Result]:
    """Calls a function with every chunk of tuples of tensors of one shape, and returns the results in order."""
    chunks = itertools.chain.from_iterable(map(_aligned_chunks, tuples))
    if not all(tensor.device.type == 'cpu' for tensors in tuples for tensor in tensors):
        # The stream that an accelerator's work goes to is this thread's.
        scratch = _Scratch()
        return [function(chunk, scratch) for chunk in chunks]
    size = sum(tensors[0].numel() for tensors in tuples)

    def make_worker() -> Callable[[_Chunks], Result]:
        scratch = _Scratch()
        return lambda chunk: function(chunk, scratch)

    return share_out(make_worker, chunks, most=size // (_CHUNKS_A_THREAD * _CPU_CHUNK))


def _apply_row(row: Row, operands: Mapping[str, torch.Tensor], scratch: _Scratch) -> None:
    target = operands[row.target]
    if isinstance(row, Lerp):
        if row.weight == 1:
            # Also the one case that integers have.
            target.copy_(operands[row.source])
        else:
            target.lerp_(scratch.like(target, operands[row.source], row.source), row.weight)
    else:
        _apply_difference(row, target, operands, scratch)


def _apply_difference(
    row: Difference,
    target: torch.Tensor,
    operands: Mapping[str, torch.Tensor],
    scratch: _Scratch,
) -> None:
    base, minuend, subtrahend = (
        scratch.like(target, operands[name], name) for name in (row.base, row.minuend, row.subtrahend)
    )
    difference = torch.sub(minuend, subtrahend, out=scratch.take('(difference)', target))
    torch.add(base, difference, alpha=row.scale, out=target)


def _aligned_chunks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cuts tensors of one shape into views of the same elements, in order."""
    chunk = _CPU_CHUNK if all(tensor.device.type == 'cpu' for tensor in tensors) else _ACCELERATOR_CHUNK
    if tensors[0].numel() <= chunk:
        return iter([tuple(tensors)])
    flat = _flattened(tensors)
    if flat is None:
        # Layouts that differ, or with gaps: cut along the first axis, whatever a slice's size.
        rows = chunk * tensors[0].shape[0] // tensors[0].numel()
        if rows:
            return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
        slices = zip(*(tensor.unbind() for tensor in tensors), strict=True)
        return (chunks for pieces in slices for chunks in _aligned_chunks(pieces))
    return zip(*(tensor.split(chunk) for tensor in flat), strict=True)


def _flattened(tensors: Sequence[torch.Tensor]) -> Optional[list[torch.Tensor]]:
    """Returns 1-d views of the tensors in one common order of their elements, or None if there is none."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    # A dense layout such as channels_last is contiguous once its axes are put in the order of their strides.
    order = sorted(range(tensors[0].ndim), key=tensors[0].stride, reverse=True)
    permuted = [tensor.permute(order) for tensor in tensors]
    return [tensor.view(-1) for tensor in permuted] if all(t.is_contiguous() for t in permuted) else None


def _sum_dtype(tensor: torch.Tensor) -> Optional[torch.dtype]:
    """Half-precision sums overflow early; wider ones keep their dtype."""
    return torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else None


def _to_host(scalars: Sequence[torch.Tensor]) -> list[complex]:
    """Returns 0-d tensors as Python numbers, with one transfer a device and dtype."""
    values: dict[int, complex] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, scalar in enumerate(scalars):
        groups.setdefault((scalar.device, scalar.dtype), []).append(index)
    for indices in groups.values():
        values.update(zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True))
    return [values[i] for i in range(len(scalars))]
