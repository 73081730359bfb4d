# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How a `LinearStep` meets memory: lists of tensors combined in place, in one pass.

Floating-point tensors on an accelerator go all at once: through the kernels of :mod:`.fused` or, where Triton does not
work, through torch's `_foreach` functions in batches. Those of fp32 and bf16 in host memory go all at once too, through
the loops of :mod:`.compiled`, where these have been compiled. All others go chunk by chunk, and small ones in batches.
A chunk is small enough that the operands of all rows of a step stay in cache, so that an update costs little more than
its memory traffic, and no temporary is larger than a chunk. Operands of another dtype or device than the target's are
converted chunk by chunk on the way. What is in host memory is shared out among threads.
"""

from __future__ import annotations

import cmath
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Optional, TypeVar

import torch

from composer_bema.averaging import foreach
from composer_bema.averaging.rules import THETA, Difference, Lerp, LinearStep, Row
from composer_bema.averaging.threads import share_out

__all__ = ['apply_step', 'distance', 'exchange', 'exchange_groups', 'first_nonfinite', 'is_exact_in']

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

# Where all tensors can go at once, and of which dtypes on an accelerator.
_ACCELERATORS = ('cuda',)
_HOST = ('cpu',)
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}

# Tensors of one shape, or chunks of them that have the same elements.
_Operands = tuple[torch.Tensor, ...]
Piece = TypeVar('Piece')
Result = TypeVar('Result')


@torch.no_grad()
def apply_step(step: LinearStep, theta: Sequence[torch.Tensor], buffers: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Applies the rows of ``step`` to every tensor, in place.

    Args:
        step (LinearStep): The rows.
        theta (Sequence[torch.Tensor]): The training weights, of any shape, dtype and device. They are only read.
        buffers (Mapping[str, Sequence[torch.Tensor]]): For each buffer that the rows name, tensors of the shapes of
            ``theta``, in the same order. What a row writes shares memory with no other operand.
    """
    names = [THETA, *buffers]
    tuples = list(zip(theta, *buffers.values(), strict=True))
    at_once, others = _split(tuples, range(len(tuples)), _accelerators(), _are_floating)
    if at_once and (fused := _fused()):
        fused.apply_rows(step.rows, names, [tuples[i] for i in at_once])
    else:
        for batch in _batches(map(_aligned_chunks, (tuples[i] for i in at_once)), _BATCH, smallest_alone=_BATCH):
            _apply_to_batch(step, names, batch)
    if compiled := _compiled():
        takes = functools.partial(compiled.takes, step.rows, names)
        at_once, others = _split(tuples, others, _HOST, takes)
        compiled.apply_rows(step.rows, names, [tuples[i] for i in at_once])

    def combine(batch: list[_Operands], scratch: _Scratch) -> None:
        if len(batch) > 1:
            _apply_to_batch(step, names, batch)
            return
        operands = dict(zip(names, batch[0], strict=True))
        for row in step.rows:
            _apply_row(row, operands, scratch)

    remaining = [tuples[i] for i in others]
    size = _CPU_CHUNK_OF_ONE if _is_one_operation(step, remaining) else _CPU_CHUNK
    chunks = (_aligned_chunks(tensors, size) for tensors in remaining)
    _share_out(combine, _batches(chunks, _CPU_CHUNK, smallest_alone=_SMALL), remaining)


@torch.no_grad()
def exchange(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    """Exchanges the values of two lists of tensors that agree in shape, dtype and device, bit for bit.

    What it does in one launch or one loop, of which there is one for each of the :func:`exchange_groups`, it does as a
    whole or not at all. No memory is in the lists twice.
    """
    pairs = list(zip(left, right, strict=True))
    for exchange_group, group in _exchanges(pairs):
        exchange_group([pairs[i] for i in group])


def _exchange_chunks(pairs: Sequence[_Operands]) -> None:
    chunks = list(itertools.chain.from_iterable(map(_aligned_chunks, pairs)))
    # All memory is had before the first value is touched, that to undo it among it.
    memory = {'exchange': [a for a, _ in chunks]}
    spare = _Scratch(memory)
    traded: list[_Operands] = []

    def trade(chunks: _Operands, scratch: _Scratch) -> None:
        _trade(chunks, scratch)
        traded.append(chunks)

    try:
        _share_out(trade, chunks, pairs, memory)
    except BaseException:
        for of_one in traded:
            _trade(of_one, spare)
        raise


def _trade(chunks: _Operands, scratch: _Scratch) -> None:
    a, b = chunks
    a_values = scratch.take('exchange', a).copy_(a)
    try:
        a.copy_(b)
        b.copy_(a_values)
    except BaseException:
        a.copy_(a_values)
        raise


def exchange_groups(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[Sequence[int]]:
    """Returns the indices of pairs in groups, each of which :func:`exchange` does in one launch or in one loop.

    For a caller that notes what is done, in case that a later group fails. Where memory is in the lists twice the order
    counts, and each pair is a group of its own.
    """
    pairs = list(zip(left, right, strict=True))
    if _share_memory(list(itertools.chain(*pairs))):
        return [[i] for i in range(len(pairs))]
    return [group for _, group in _exchanges(pairs)]


@torch.no_grad()
def distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Returns the Euclidean distance between two lists of tensors of the same shapes, in the weights' unit."""

    def square(chunks: _Operands, scratch: _Scratch) -> torch.Tensor:
        a, b = chunks
        difference = torch.sub(scratch.like(b, a, 'left'), b, out=scratch.take('(difference)', b))
        return torch.linalg.vector_norm(difference).float().square()

    squares = _for_each_chunk(square, list(zip(left, right, strict=True)))
    return math.sqrt(sum(torch.stack(squares).tolist())) if squares else 0.0


@torch.no_grad()
def first_nonfinite(tensors: Sequence[torch.Tensor]) -> Optional[int]:
    """Returns the index of the first tensor that holds a NaN or an infinity, or None.

    One read of the values, which has to come before an update and not ride on it, or the chunks before the bad one
    would be updated. A chunk's sum stands for its values: it is finite unless one of them is not, or it overflows, so
    that a suspect is looked at closely.
    """
    alone = list(zip(tensors, strict=True))
    bad: list[int] = []
    at_once, others = _split(alone, range(len(alone)), _accelerators(), _are_floating)
    if at_once and (fused := _fused()):
        first = fused.first_nonfinite([tensors[i] for i in at_once])
        bad += [] if first is None else [at_once[first]]
    else:
        others = range(len(alone))
    if compiled := _compiled():
        at_once, others = _split(alone, others, _HOST, set(compiled.DTYPES).issuperset)
        first = compiled.first_nonfinite([tensors[i] for i in at_once])
        bad += [] if first is None else [at_once[first]]

    def add_up(chunks: _Operands, scratch: _Scratch) -> torch.Tensor:
        (chunk,) = chunks
        return chunk.sum(dtype=_sum_dtype(chunk))

    remaining = [alone[i] for i in others]
    # Half-precision values are converted on the way, in memory of a chunk's size.
    sizes = [_CPU_CHUNK_OF_ONE if _sum_dtype(alone) is None else _CPU_CHUNK for (alone,) in remaining]
    chunks = [list(_aligned_chunks(alone, size)) for alone, size in zip(remaining, sizes, strict=True)]
    sums = _to_host(_share_out(add_up, itertools.chain.from_iterable(chunks), remaining))
    owners = (i for i, of_one in zip(others, chunks, strict=True) for _ in of_one)
    suspects = dict.fromkeys(i for i, value in zip(owners, sums, strict=True) if not cmath.isfinite(value))
    bad += next(([i] for i in suspects if not _is_finite(tensors[i])), [])
    return min(bad, default=None)


@torch.no_grad()
def is_exact_in(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether every value of ``tensor`` survives a round trip through ``dtype``."""
    return all(torch.equal(chunk, chunk.to(dtype).to(chunk.dtype)) for (chunk,) in _aligned_chunks((tensor,)))


@functools.cache
def _fused() -> Optional[ModuleType]:
    """Returns the kernels that take all tensors in one launch, if Triton is there and works."""
    try:
        from composer_bema.averaging import fused
    except ImportError:
        return None
    try:
        fused.probe()
    except Exception as error:
        # Triton compiles as it goes: it may find no C compiler, no folder to write to, or a device unknown to it.
        warnings.warn(f'Averages are updated by slower kernels, for those of Triton do not run: {error}', stacklevel=2)
        return None
    return fused


@functools.cache
def _compiled() -> Optional[ModuleType]:
    """Returns the kernels that take all tensors in host memory in one loop, if they were compiled."""
    try:
        from composer_bema.averaging import compiled
    except ImportError:
        return None
    return compiled


def _accelerators() -> Collection[str]:
    """Returns the types of devices that this process can have tensors on, beside the host."""
    return _ACCELERATORS if torch.cuda.is_initialized() else ()


def _are_floating(dtypes: Collection[torch.dtype]) -> bool:
    return _FLOATING.issuperset(dtypes)


def _are_alike(dtypes: Collection[torch.dtype]) -> bool:
    return len(set(dtypes)) == 1


def _split(
    tuples: Sequence[_Operands],
    among: Sequence[int],
    devices: Collection[str],
    takes: Callable[[tuple[torch.dtype, ...]], bool],
) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the indices of tensors that can go all at once, and of the others.

    Args:
        tuples (Sequence[tuple[torch.Tensor, ...]]): The operands of each tensor.
        among (Sequence[int]): The indices that are meant.
        devices (Collection[str]): The types of devices where they can.
        takes (Callable[[tuple[torch.dtype, ...]], bool]): Whether operands of some dtypes can.
    """
    if not devices:
        return [], among
    takes = functools.cache(takes)
    at_once: list[int] = []
    others: list[int] = []
    for i in among:
        can = _lie_alike(tuples[i], devices) and takes(tuple([tensor.dtype for tensor in tuples[i]]))
        (at_once if can else others).append(i)
    return at_once, others


def _exchanges(pairs: Sequence[_Operands]) -> list[tuple[Callable[[Sequence[_Operands]], None], Sequence[int]]]:
    """Returns what exchanges pairs as a whole, each with the indices of those that it takes."""
    groups: list[tuple[Callable[[Sequence[_Operands]], None], Sequence[int]]] = []
    at_once, others = _split(pairs, range(len(pairs)), _accelerators(), _are_alike)
    if at_once and (fused := _fused()):
        launches: dict[tuple, list[int]] = {}
        for i in at_once:
            launches.setdefault(fused.exchange_launch(pairs[i]), []).append(i)
        groups += [(fused.exchange, launch) for launch in launches.values()]
    else:
        others = range(len(pairs))
    if compiled := _compiled():
        at_once, others = _split(pairs, others, _HOST, _are_alike)
        groups.append((compiled.exchange, at_once))
    # The chunks come first: what they refuse to write to has then kept all from being exchanged.
    return [(function, group) for function, group in ((_exchange_chunks, others), *groups) if group]


def _lie_alike(tensors: _Operands, devices: Collection[str]) -> bool:
    """Returns whether tensors of one shape are plain memory of one device, dense and in one order."""
    device, numel = tensors[0].device, tensors[0].numel()
    if device.type not in devices:
        return False
    contiguous = True
    for tensor in tensors:
        if tensor.device != device or tensor.numel() != numel or not _is_plain(tensor):
            return False
        contiguous = contiguous and tensor.is_contiguous()
    return contiguous or _flattened(tensors) is not None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's values are what is in its memory, and not what a subclass or a view makes of that."""
    return type(tensor) in _PLAIN_TYPES and not (tensor.is_neg() or tensor.is_conj())


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Returns whether two of the tensors may share memory, so that what is done to them has an order."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel())
    return any(start < end for (_, end), (start, _) in itertools.pairwise(spans))


def _extent(tensor: torch.Tensor) -> int:
    """Returns the bytes from the first to the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


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


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(chunk).all()) for (chunk,) in _aligned_chunks((tensor,)))


class _Scratch:
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


def _for_each_chunk(function: Callable[[_Operands, _Scratch], Result], tuples: Sequence[_Operands]) -> list[Result]:
    """Calls a function with every chunk of tuples of tensors of one shape, and returns the results in order."""
    return _share_out(function, itertools.chain.from_iterable(map(_aligned_chunks, tuples)), tuples)


def _share_out(
    function: Callable[[Piece, _Scratch], Result],
    pieces: Iterable[Piece],
    tuples: Sequence[_Operands],
    reserved: Optional[Mapping[str, Sequence[torch.Tensor]]] = None,
) -> list[Result]:
    """Calls a function with every piece of tuples of tensors, on several threads where they are in host memory.

    Args:
        function (Callable[[Piece, _Scratch], Result]): The function.
        pieces (Iterable[Piece]): The pieces.
        tuples (Sequence[tuple[torch.Tensor, ...]]): What the pieces are of.
        reserved (Mapping[str, Sequence[torch.Tensor]], optional): The memory to have before the function is called at
            all, as for :class:`_Scratch`.
    """

    def make_worker() -> Callable[[Piece], Result]:
        scratch = _Scratch(reserved)
        return lambda piece: function(piece, scratch)

    if not all(tensor.device.type == 'cpu' for tensors in tuples for tensor in tensors):
        # The stream that an accelerator's work goes to is this thread's.
        return list(map(make_worker(), pieces))
    size = sum(tensors[0].numel() for tensors in tuples)
    return share_out(make_worker, pieces, most=size // (_CHUNKS_A_THREAD * _CPU_CHUNK))


def _is_one_operation(step: LinearStep, tuples: Sequence[_Operands]) -> bool:
    """Returns whether a step neither hands anything on through the cache, nor converts through a chunk's memory."""
    alike = all(tensor.dtype == tensors[0].dtype for tensors in tuples for tensor in tensors)
    return alike and len(step.rows) == 1 and isinstance(step.rows[0], Lerp)


def _apply_to_batch(step: LinearStep, names: Sequence[str], batch: Sequence[_Operands]) -> None:
    foreach.apply_rows(step.rows, dict(zip(names, zip(*batch, strict=True), strict=True)))


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


def _aligned_chunks(tensors: _Operands, on_host: Optional[int] = None) -> Iterator[_Operands]:
    """Cuts tensors of one shape into views of the same elements, in order; in host memory of ``on_host`` at most."""
    chunk = (on_host or _CPU_CHUNK) if all(tensor.device.type == 'cpu' for tensor in tensors) else _ACCELERATOR_CHUNK
    if tensors[0].numel() <= chunk:
        return iter([tuple(tensors)])
    flat = _flattened(tensors)
    if flat is None:
        # Layouts that differ, or with gaps: cut along the first axis, whatever a slice's size.
        rows = chunk * tensors[0].shape[0] // tensors[0].numel()
        if rows:
            return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
        slices = zip(*(tensor.unbind() for tensor in tensors), strict=True)
        return (chunks for pieces in slices for chunks in _aligned_chunks(pieces, on_host))
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
