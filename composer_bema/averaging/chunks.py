# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Lists of tensors chunk by chunk, by torch's own operations, whatever their dtypes, devices and layouts.

A chunk is small enough that the operands of all rows of a step stay in cache, so that an update costs little more than
its memory traffic, and no temporary is larger than a chunk. Operands of another dtype or device than the target's are
converted chunk by chunk on the way. Small tensors go in batches. What is in host memory is shared out among threads.
"""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Optional, TypeVar

import torch

from composer_bema.averaging import foreach
from composer_bema.averaging.rules import Difference, Lerp, Row
from composer_bema.averaging.threads import share_out

__all__ = [
    'Scratch',
    'aligned',
    'apply_rows',
    'apply_rows_in_batches',
    'exchange',
    'first_nonfinite',
    'flattened',
    'for_each',
]

# Elements a chunk, of which each thread has one: five fp32 operands are 5 MiB of the cache. An accelerator wants fewer,
# larger launches.
_CPU_CHUNK = 256 * 1024
# The same where one operation is all there is, which finds nothing in the cache: the fewer calls the better.
_CPU_CHUNK_OF_ONE = 8 * _CPU_CHUNK
_ACCELERATOR_CHUNK = 16 * 1024 * 1024
# Elements a batch of `_foreach`, whose temporaries are as large as its operands.
_BATCH = 4 * _ACCELERATOR_CHUNK
# Elements below which calling an operation takes longer than doing it; tensors in host memory then go in batches, too.
_SMALL = 16 * 1024
# A thread takes about as long to start as one chunk does.
_CHUNKS_A_THREAD = 4

# Tensors of one shape, or chunks of them that have the same elements.
_Operands = tuple[torch.Tensor, ...]
Piece = TypeVar('Piece')
Result = TypeVar('Result')


def apply_rows(rows: Sequence[Row], names: Sequence[str], tensors: Sequence[_Operands]) -> None:
    """Applies rows in place.

    Args:
        rows (Sequence[Row]): The rows.
        names (Sequence[str]): The operands.
        tensors (Sequence[tuple[torch.Tensor, ...]]): For each tensor its operands, of one shape, in the order of
            ``names``. What a row writes shares memory with no other operand.
    """

    def combine(batch: list[_Operands], scratch: Scratch) -> None:
        if len(batch) > 1:
            _apply_to_batch(rows, names, batch)
            return
        operands = dict(zip(names, batch[0], strict=True))
        for row in rows:
            _apply_row(row, operands, scratch)

    size = _CPU_CHUNK_OF_ONE if _is_one_operation(rows, tensors) else _CPU_CHUNK
    cut = (aligned(operands, size) for operands in tensors)
    _share_out(combine, _batches(cut, _CPU_CHUNK, smallest_alone=_SMALL), tensors)


def apply_rows_in_batches(rows: Sequence[Row], names: Sequence[str], tensors: Sequence[_Operands]) -> None:
    """Does the same on an accelerator, with fewer and larger launches, and with temporaries as large as a batch."""
    for batch in _batches(map(aligned, tensors), _BATCH, smallest_alone=_BATCH):
        _apply_to_batch(rows, names, batch)


def exchange(pairs: Sequence[_Operands]) -> None:
    """Exchanges the values of each pair, which agrees in shape, dtype and device, bit for bit; all of them or none."""
    chunks = list(itertools.chain.from_iterable(map(aligned, pairs)))
    # All memory is had before the first value is touched, that to undo it among it.
    memory = {'exchange': [a for a, _ in chunks]}
    spare = Scratch(memory)
    traded: list[_Operands] = []

    def trade(chunks: _Operands, scratch: Scratch) -> None:
        _trade(chunks, scratch)
        traded.append(chunks)

    try:
        _share_out(trade, chunks, pairs, memory)
    except BaseException:
        for of_one in traded:
            _trade(of_one, spare)
        raise


def _trade(chunks: _Operands, scratch: Scratch) -> None:
    a, b = chunks
    a_values = scratch.take('exchange', a).copy_(a)
    try:
        a.copy_(b)
        b.copy_(a_values)
    except BaseException:
        a.copy_(a_values)
        raise


def first_nonfinite(tensors: Sequence[torch.Tensor]) -> Optional[int]:
    """Returns the index of the first tensor that holds a NaN or an infinity, or None.

    A chunk's sum stands for its values: it is finite unless one of them is not, or it overflows, so that a suspect is
    looked at closely.
    """

    def add_up(chunks: _Operands, scratch: Scratch) -> torch.Tensor:
        (chunk,) = chunks
        return chunk.sum(dtype=_sum_dtype(chunk))

    alone = list(zip(tensors, strict=True))
    # Half-precision values are converted on the way, in memory of a chunk's size.
    sizes = [_CPU_CHUNK_OF_ONE if _sum_dtype(tensor) is None else _CPU_CHUNK for tensor in tensors]
    cut = [list(aligned(operands, size)) for operands, size in zip(alone, sizes, strict=True)]
    sums = _to_host(_share_out(add_up, itertools.chain.from_iterable(cut), alone))
    owners = (i for i, of_one in enumerate(cut) for _ in of_one)
    suspects = dict.fromkeys(i for i, value in zip(owners, sums, strict=True) if not cmath.isfinite(value))
    return next((i for i in suspects if not _is_finite(tensors[i])), None)


def for_each(function: Callable[[_Operands, Scratch], Result], tuples: Sequence[_Operands]) -> list[Result]:
    """Calls a function with every chunk of tuples of tensors of one shape, and returns the results in order."""
    return _share_out(function, itertools.chain.from_iterable(map(aligned, tuples)), tuples)


def aligned(tensors: _Operands, on_host: Optional[int] = None) -> Iterator[_Operands]:
    """Cuts tensors of one shape into views of the same elements, in order; in host memory of ``on_host`` at most."""
    chunk = (on_host or _CPU_CHUNK) if all(tensor.device.type == 'cpu' for tensor in tensors) else _ACCELERATOR_CHUNK
    if tensors[0].numel() <= chunk:
        return iter([tuple(tensors)])
    flat = flattened(tensors)
    if flat is None:
        # Layouts that differ, or with gaps: cut along the first axis, whatever a slice's size.
        rows = chunk * tensors[0].shape[0] // tensors[0].numel()
        if rows:
            return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
        slices = zip(*(tensor.unbind() for tensor in tensors), strict=True)
        return (chunks for pieces in slices for chunks in aligned(pieces, on_host))
    return zip(*(tensor.split(chunk) for tensor in flat), strict=True)


def flattened(tensors: Sequence[torch.Tensor]) -> Optional[list[torch.Tensor]]:
    """Returns 1-d views of the tensors in one common order of their elements, or None if there is none."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    # A dense layout such as channels_last is contiguous once its axes are put in the order of their strides.
    order = sorted(range(tensors[0].ndim), key=tensors[0].stride, reverse=True)
    permuted = [tensor.permute(order) for tensor in tensors]
    return [tensor.view(-1) for tensor in permuted] if all(t.is_contiguous() for t in permuted) else None


class Scratch:
    """Chunk-sized temporaries, allocated once a pass and handed out again for every chunk.

    Args:
        reserved (Mapping[str, Sequence[torch.Tensor]], optional): What to allocate right away: for each role, what it
            takes for any of some tensors.
    """

    def __init__(self, reserved: Optional[Mapping[str, Sequence[torch.Tensor]]] = None) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        for role, likes in (reserved or {}).items():
            for like in sorted(likes, key=torch.numel, reverse=True):
                self.take(role, like)

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


def _share_out(
    function: Callable[[Piece, Scratch], Result],
    pieces: Iterable[Piece],
    tuples: Sequence[_Operands],
    reserved: Optional[Mapping[str, Sequence[torch.Tensor]]] = None,
) -> list[Result]:
    """Calls a function with every piece of tuples of tensors, on several threads where they are in host memory.

    Args:
        function (Callable[[Piece, Scratch], Result]): The function.
        pieces (Iterable[Piece]): The pieces.
        tuples (Sequence[tuple[torch.Tensor, ...]]): What the pieces are of.
        reserved (Mapping[str, Sequence[torch.Tensor]], optional): The memory to have before the function is called at
            all, as for :class:`Scratch`.
    """

    if not tuples:
        return []

    def make_worker() -> Callable[[Piece], Result]:
        scratch = Scratch(reserved)
        return lambda piece: function(piece, scratch)

    if not all(tensor.device.type == 'cpu' for tensors in tuples for tensor in tensors):
        # The stream that an accelerator's work goes to is this thread's.
        return list(map(make_worker(), pieces))
    size = sum(tensors[0].numel() for tensors in tuples)
    return share_out(make_worker, pieces, most=size // (_CHUNKS_A_THREAD * _CPU_CHUNK))


def _batches(cut: Iterable[Iterable[_Operands]], most: int, smallest_alone: int) -> Iterator[list[_Operands]]:
    """Puts chunks into lists that agree in dtypes and device.

    Args:
        cut (Iterable[Iterable[tuple[torch.Tensor, ...]]]): The chunks of each tensor's operands.
        most (int): The elements of a list.
        smallest_alone (int): The elements from which on a chunk is a list of its own. So is one of several devices.
    """
    batches: dict[tuple, list[_Operands]] = {}
    elements: dict[tuple, int] = {}
    for chunks in itertools.chain.from_iterable(cut):
        count, device = chunks[0].numel(), chunks[0].device
        if count >= smallest_alone or any(chunk.device != device for chunk in chunks):
            yield [chunks]
            continue
        key = (device, *(chunk.dtype for chunk in chunks))
        if elements.get(key, 0) + count > most and key in batches:
            yield batches.pop(key)
            elements[key] = 0
        batches.setdefault(key, []).append(chunks)
        elements[key] = elements.get(key, 0) + count
    yield from batches.values()


def _is_one_operation(rows: Sequence[Row], tuples: Sequence[_Operands]) -> bool:
    """Returns whether rows neither hand anything on through the cache, nor convert through a chunk's memory."""
    alike = all(tensor.dtype == tensors[0].dtype for tensors in tuples for tensor in tensors)
    return alike and len(rows) == 1 and isinstance(rows[0], Lerp)


def _apply_to_batch(rows: Sequence[Row], names: Sequence[str], batch: Sequence[_Operands]) -> None:
    foreach.apply_rows(rows, dict(zip(names, zip(*batch, strict=True), strict=True)))


def _apply_row(row: Row, operands: Mapping[str, torch.Tensor], scratch: Scratch) -> None:
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
    scratch: Scratch,
) -> None:
    base, minuend, subtrahend = (
        scratch.like(target, operands[name], name) for name in (row.base, row.minuend, row.subtrahend)
    )
    difference = torch.sub(minuend, subtrahend, out=scratch.take('(difference)', target))
    torch.add(base, difference, alpha=row.scale, out=target)


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(chunk).all()) for (chunk,) in aligned((tensor,)))


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
