# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How a `LinearStep` meets memory: lists of tensors combined in place, in one pass.

Here it is decided what goes where. Floating-point tensors on an accelerator go all at once: through the kernels of
:mod:`.fused` or, where Triton does not work, through torch's `_foreach` functions in batches. Those of fp32 and bf16 in
host memory go all at once too, through the loops of :mod:`.compiled`, where these have been compiled. All others go
through :mod:`.chunks`.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Optional

import torch

from composer_bema.averaging import chunks
from composer_bema.averaging.rules import THETA, LinearStep

__all__ = ['apply_step', 'distance', 'exchange', 'exchange_groups', 'first_nonfinite', 'is_exact_in']

# Where all tensors can go at once, and of which dtypes on an accelerator.
_ACCELERATORS = ('cuda',)
_HOST = ('cpu',)
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}

# Tensors of one shape.
_Operands = tuple[torch.Tensor, ...]


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
        chunks.apply_rows_in_batches(step.rows, names, [tuples[i] for i in at_once])
    if compiled := _compiled():
        takes = functools.partial(compiled.takes, step.rows, names)
        at_once, others = _split(tuples, others, _HOST, takes)
        compiled.apply_rows(step.rows, names, [tuples[i] for i in at_once])
    chunks.apply_rows(step.rows, names, [tuples[i] for i in others])


@torch.no_grad()
def exchange(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    """Exchanges the values of two lists of tensors that agree in shape, dtype and device, bit for bit.

    What it does in one launch or one loop, of which there is one for each of the :func:`exchange_groups`, it does as a
    whole or not at all. No memory is in the lists twice.
    """
    pairs = list(zip(left, right, strict=True))
    for exchange_group, group in _exchanges(pairs):
        exchange_group([pairs[i] for i in group])


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

    def square(pieces: _Operands, scratch: chunks.Scratch) -> torch.Tensor:
        a, b = pieces
        difference = torch.sub(scratch.like(b, a, 'left'), b, out=scratch.take('(difference)', b))
        return torch.linalg.vector_norm(difference).float().square()

    squares = chunks.for_each(square, list(zip(left, right, strict=True)))
    return math.sqrt(sum(torch.stack(squares).tolist())) if squares else 0.0


@torch.no_grad()
def first_nonfinite(tensors: Sequence[torch.Tensor]) -> Optional[int]:
    """Returns the index of the first tensor that holds a NaN or an infinity, or None.

    One read of the values, which has to come before an update and not ride on it, or what comes before the bad one
    would be updated.
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

    first = chunks.first_nonfinite([tensors[i] for i in others])
    bad += [] if first is None else [others[first]]
    return min(bad, default=None)


@torch.no_grad()
def is_exact_in(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether every value of ``tensor`` survives a round trip through ``dtype``."""
    return all(torch.equal(chunk, chunk.to(dtype).to(chunk.dtype)) for (chunk,) in chunks.aligned((tensor,)))


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
    return [(function, group) for function, group in ((chunks.exchange, others), *groups) if group]


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
    return contiguous or chunks.flattened(tensors) is not None


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
