# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Lists of tensors on an accelerator, thousands at a time, in one launch of a Triton kernel.

A launch is given two tables: for each tensor where its operands lie and how many elements they have, and for each block
of elements which tensor it is of. A program takes one block, reads every operand of it once, and writes every target
once; what is between stays in registers. Operands are dense and have their elements in one order, so that memory can be
walked without shapes.

Only :mod:`.kernels` imports this module, and only when there are tensors for it, since Triton may be missing.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch.autograd.graph import increment_version

from composer_bema.averaging.fused_kernels import exchange_kernel, nonfinite_kernel, step_kernel
from composer_bema.averaging.rules import Difference, Lerp, Row, as_difference

__all__ = ['apply_rows', 'exchange', 'exchange_launch', 'first_nonfinite', 'probe']

if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
    raise ImportError(f'The kernels need the tuples of Triton 3.3, and this is {triton.__version__}.')

# A thread has eight elements of each operand: two loads of 16 bytes in fp32.
_BLOCK = 2048
_NUM_WARPS = 8

# Dtypes as the kernels are told of them, four bits each.
_CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
}
# An exchange moves bits, whatever they mean.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What a launch is at most told of: the parameters of `step_kernel`, and the operands that four bits can count.
_MOST_ROWS = 8
_MOST_OPERANDS = 16


class _Operands(NamedTuple):
    """The operands of one tensor: all that a plan depends on."""

    device: torch.device
    numel: int
    dtypes: tuple[torch.dtype, ...]
    addresses: tuple[int, ...]

    @property
    def vector(self) -> int:
        """The elements that a thread may load at once: 16 bytes of the widest operand, or 1 if one is not aligned."""
        sizes = [dtype.itemsize for dtype in self.dtypes]
        vector = 16 // max(sizes)
        aligned = all(address % (vector * size) == 0 for address, size in zip(self.addresses, sizes, strict=True))
        return vector if aligned else 1

    @property
    def launch(self) -> tuple[torch.device, tuple[torch.dtype, ...], int]:
        """What tensors that share a launch have in common."""
        return self.device, self.dtypes, self.vector


class _Launch(NamedTuple):
    """The tables of a launch, and what its kernel is compiled for."""

    table: torch.Tensor
    """int64, of shape (tensors, 3 + operands): first block, elements, position in the list, and the addresses."""
    tensor_of_block: torch.Tensor
    """int32, of shape (blocks,)."""
    constants: dict[str, int]


def apply_rows(rows: Sequence[Row], names: Sequence[str], tensors: Sequence[Sequence[torch.Tensor]]) -> None:
    """Applies rows in place, in one launch for all tensors that agree in their dtypes.

    Args:
        rows (Sequence[Row]): The rows. More than eight take a further launch.
        names (Sequence[str]): The operands.
        tensors (Sequence[Sequence[torch.Tensor]]): For each tensor its operands, in the order of ``names``: of fp16,
            bf16, fp32 or fp64, on one device, dense, with their elements in one order. What a row writes shares memory
            with no other operand.
    """
    for part in _parts(rows):
        coded = _Coded()
        codes = [coded.add(row) for row in part]
        columns = [names.index(name) for name in coded.operands]
        operands = tuple(_operands([of_one[column] for column in columns]) for of_one in tensors)
        scales = coded.scales + [0] * (_MOST_ROWS - len(part))
        for launch in _plan(operands):
            rows_code = sum(code << 16 * place for place, code in enumerate(codes))
            _run(step_kernel, launch, *scales, ROWS=rows_code, NUM_ROWS=len(part))
    targets = {names.index(row.target) for row in rows}
    increment_version([of_one[column] for of_one in tensors for column in targets])


def exchange(pairs: Sequence[Sequence[torch.Tensor]]) -> None:
    """Exchanges the values of each pair bit for bit, in one launch for all pairs of which `exchange_launch` is equal.

    Args:
        pairs (Sequence[Sequence[torch.Tensor]]): Two tensors of one dtype and device each, dense, with their elements
            in one order. They share no memory.
    """
    for launch in _plan(tuple(map(_as_words, pairs))):
        _run(exchange_kernel, launch)
    increment_version([tensor for pair in pairs for tensor in pair])


def exchange_launch(pair: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Returns what pairs have in common that are exchanged in the same launch."""
    return _as_words(pair).launch


def first_nonfinite(tensors: Sequence[torch.Tensor]) -> Optional[int]:
    """Returns the index of the first of dense floating-point tensors that holds a NaN or an infinity, or None.

    Every value is read once, and one number comes to the host from each device.
    """
    first_bad = {}
    for launch in _plan(tuple(_operands([tensor]) for tensor in tensors)):
        device = launch.table.device
        if device not in first_bad:
            first_bad[device] = torch.full((), len(tensors), dtype=torch.int32, device=device)
        _run(nonfinite_kernel, launch, first_bad[device])
    first = min((value.item() for value in first_bad.values()), default=len(tensors))
    return None if first == len(tensors) else int(first)


def probe(device: str = 'cuda') -> None:
    """Tries every kernel on a few numbers: Triton may lack what it compiles with, or support for the device.

    Raises:
        Exception: Whatever kept one from running.
        RuntimeError: If one has computed something else.
    """
    theta, average = torch.tensor([[4.0, 8.0, 0.0, 0.0], [0.0, -4.0, 0.0, 8.0]], device=device).unbind()
    rows = [Lerp('average', 'theta', 0.25), Difference('average', 'average', 0.5, 'theta', 'average')]
    apply_rows(rows, ('theta', 'average'), [(theta, average)])
    exchange([(theta, average)])
    first_bad = first_nonfinite([theta, average, 1 / average])
    found = [*theta.tolist(), *average.tolist(), first_bad]
    if found != [2.5, 3.5, 0.0, 3.0, 4.0, 8.0, 0.0, 0.0, 2]:
        raise RuntimeError(f'a trial of them gave {found}')


class _Coded:
    """Rows as the kernel is told of them: every row is ``target <- base + scale (minuend - subtrahend)``.

    Attributes:
        operands (dict[str, int]): The operands by their index, in the order in which rows name them first, so that
            rotating names (the slots of a window) need no new kernel.
        scales (list[int]): The bits of the scales, which Triton would round to fp32 if it was given floats.
    """

    def __init__(self) -> None:
        self.operands: dict[str, int] = {}
        self.scales: list[int] = []

    def add(self, row: Row) -> int:
        """Returns the operands' indices, four bits each."""
        difference = as_difference(row)
        names = _names(difference)
        self.scales.append(struct.unpack('=q', struct.pack('=d', difference.scale))[0])
        return sum(self.operands.setdefault(name, len(self.operands)) << 4 * place for place, name in enumerate(names))


def _names(row: Difference) -> tuple[str, str, str, str]:
    return row.target, row.base, row.minuend, row.subtrahend


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cuts rows into what a launch can be told of."""
    part: list[Row] = []
    named: set[str] = set()
    for row in rows:
        more = set(_names(as_difference(row)))
        if part and (len(part) == _MOST_ROWS or len(named | more) > _MOST_OPERANDS):
            yield part
            part, named = [], set()
        part.append(row)
        named |= more
    yield part


def _operands(tensors: Sequence[torch.Tensor]) -> _Operands:
    first = tensors[0]
    dtypes = tuple([tensor.dtype for tensor in tensors])
    return _Operands(first.device, first.numel(), dtypes, tuple([tensor.data_ptr() for tensor in tensors]))


def _as_words(pair: Sequence[torch.Tensor]) -> _Operands:
    """Returns a pair as integers of its elements' size, or of half of it for the widest complex numbers."""
    device, numel, (dtype, _), addresses = _operands(pair)
    size = min(dtype.itemsize, 8)
    return _Operands(device, numel * (dtype.itemsize // size), (_WORDS[size],) * 2, addresses)


@functools.lru_cache(maxsize=64)
def _plan(operands: tuple[_Operands, ...]) -> list[_Launch]:
    """Returns the launches that take all tensors. Made once for the addresses of a model and of its buffers."""
    groups: dict[tuple, list[int]] = {}
    for position, of_one in enumerate(operands):
        if of_one.numel:
            groups.setdefault(of_one.launch, []).append(position)
    return [_make_launch([operands[p] for p in positions], positions) for positions in groups.values()]


def _make_launch(operands: Sequence[_Operands], positions: Sequence[int]) -> _Launch:
    device, dtypes, vector = operands[0].launch
    entries = [(0, o.numel, p, *o.addresses) for o, p in zip(operands, positions, strict=True)]
    table = torch.tensor(entries, device='cpu')
    blocks = (table[:, 1] + (_BLOCK - 1)) // _BLOCK
    table[1:, 0] = blocks.cumsum(0)[:-1]
    tensor_of_block = torch.arange(len(operands), dtype=torch.int32, device='cpu').repeat_interleave(blocks)
    dtypes_code = sum(_CODES[dtype] << 4 * place for place, dtype in enumerate(dtypes))
    constants = {'DTYPES': dtypes_code, 'OPERANDS': len(dtypes), 'VECTOR': vector, 'BLOCK': _BLOCK}
    return _Launch(table.to(device), tensor_of_block.to(device), constants)


def _run(kernel: Any, launch: _Launch, *arguments: Any, **constants: int) -> None:
    table, tensor_of_block, shared = launch
    with torch.cuda.device_of(table):
        kernel[(len(tensor_of_block),)](table, tensor_of_block, *arguments, **constants, **shared, num_warps=_NUM_WARPS)
        if table.is_cuda:
            # The plan may be dropped before another stream than the one it was made on has done the launch.
            for used in (table, tensor_of_block):
                used.record_stream(torch.cuda.current_stream())
