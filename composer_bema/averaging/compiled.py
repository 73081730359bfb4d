# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Lists of tensors in host memory in one pass, by the loops of ``compiled_kernels.c``.

They are compiled when the package is installed, if there is a C compiler. Between two of torch's operations a thread
waits for Python's lock, and they hand on through a cache what a loop has at hand. The numbers are torch's, bit for bit
but for what a NaN carries. Operands are dense and have their elements in one order: memory is walked without shapes.

Only :mod:`.kernels` imports this module, which fails where there is no library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import platform
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Optional, TypeVar

import torch
from torch.autograd.graph import increment_version

from composer_bema.averaging.rules import Lerp, Row, as_difference
from composer_bema.averaging.threads import share_out

__all__ = ['DTYPES', 'apply_rows', 'exchange', 'first_nonfinite', 'takes']

# Those of weights and buffers that are computed with, as the library is told of them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

# The elements, or the bytes of an exchange, that take about as long as it takes to start a thread.
_A_THREAD = 1024 * 1024

# As Python calls it on Linux, macOS and Windows.
_X86 = ('x86_64', 'AMD64')

_SOURCE = Path(__file__).with_name('compiled_kernels.c')

_Operands = Sequence[torch.Tensor]
Result = TypeVar('Result')


class _Row(ctypes.Structure):
    """``struct row`` of the library."""

    _fields_ = (
        ('target', ctypes.c_int32),
        ('base', ctypes.c_int32),
        ('minuend', ctypes.c_int32),
        ('subtrahend', ctypes.c_int32),
        ('scale', ctypes.c_float),
    )


class _Tensors(ctypes.Structure):
    """``struct tensors`` of the library."""

    _fields_ = (
        ('addresses', ctypes.c_void_p),
        ('num_operands', ctypes.c_int64),
        ('sizes', ctypes.c_void_p),
        ('num_tensors', ctypes.c_int64),
        ('num_taken', ctypes.c_void_p),
    )


def _load() -> ctypes.CDLL:
    """Returns the library.

    Raises:
        ImportError: If it was not compiled, or not from this source, does not load, or would round unlike torch.
    """
    spec = importlib.util.find_spec('composer_bema.averaging._compiled_kernels')
    if spec is None or spec.origin is None:
        raise ImportError('They were not compiled: no C compiler did so when composer_bema was installed.')
    if platform.machine() in _X86 and not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        raise ImportError('torch rounds products and sums one by one on this processor, and they do so at once.')
    try:
        library = ctypes.CDLL(spec.origin)
        library.source_digest.restype = ctypes.c_uint32
        is_of_source = library.source_digest() == zlib.crc32(_SOURCE.read_bytes())
    except (OSError, AttributeError) as error:
        raise ImportError(f'{spec.origin} cannot be used: {error}') from error
    if not is_of_source:
        raise ImportError(f'{spec.origin} was compiled from another {_SOURCE.name}: install composer_bema anew.')
    tensors = ctypes.POINTER(_Tensors)
    library.apply_rows.argtypes = (tensors, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.apply_rows.restype = None
    library.exchange.argtypes = (tensors,)
    library.exchange.restype = None
    library.first_nonfinite.argtypes = (tensors, ctypes.c_int32)
    library.first_nonfinite.restype = ctypes.c_int64
    return library


_LIBRARY = _load()


class _Work:
    """What the library is to do something with: tensors, as it is told of them, and how far it has come.

    Args:
        tensors (Sequence[Sequence[torch.Tensor]]): Their operands, as many of each and of at least one.
        in_bytes (bool): Whether it goes byte by byte, and not element by element. Default: ``False``.
    """

    def __init__(self, tensors: Sequence[_Operands], in_bytes: bool = False) -> None:
        self._addresses = array('Q', [tensor.data_ptr() for operands in tensors for tensor in operands])
        self._sizes = array('q', [first.nbytes if in_bytes else first.numel() for first, *_ in tensors])
        self._num_taken = array('q', [0])
        addresses, sizes, num_taken = (a.buffer_info()[0] for a in (self._addresses, self._sizes, self._num_taken))
        self.tensors = _Tensors(addresses, len(tensors[0]), sizes, len(tensors), num_taken)

    def start_over(self) -> None:
        """Lets it be done once more."""
        self._num_taken[0] = 0

    def share_out(self, function: Callable[..., Result], *arguments: object) -> list[Result]:
        """Has several threads call a function of the library, which needs no lock of Python's."""
        threads = max(sum(self._sizes) // _A_THREAD, 1)

        def call(_: int) -> Result:
            return function(self.tensors, *arguments)

        return share_out(lambda: call, range(threads), most=threads)


def takes(rows: Sequence[Row], names: Sequence[str], dtypes: Sequence[torch.dtype]) -> bool:
    """Returns whether rows can be applied to operands of these dtypes: nothing is ever rounded to less than fp32."""
    if not all(dtype in DTYPES for dtype in dtypes):
        return False
    dtype_of = dict(zip(names, dtypes, strict=True))
    differences = [(dtype_of[row.target], as_difference(row)) for row in rows]
    return all(
        dtype == torch.float32 or (row.minuend == row.subtrahend and dtype_of[row.base] == dtype)
        for dtype, row in differences
    )


def apply_rows(rows: Sequence[Row], names: Sequence[str], tensors: Sequence[_Operands]) -> None:
    """Applies rows in place.

    Args:
        rows (Sequence[Row]): The rows.
        names (Sequence[str]): The operands.
        tensors (Sequence[Sequence[torch.Tensor]]): For each tensor its operands, in the order of ``names``: in host
            memory, of dtypes that :func:`takes` accepts, dense, with their elements in one order. What a row writes
            shares memory with no other operand.
    """
    coded = (_Row * len(rows))(*(_code(row, names) for row in rows))
    for dtypes, positions in _by_dtypes(tensors).items():
        codes = (ctypes.c_int32 * len(dtypes))(*(DTYPES[dtype] for dtype in dtypes))
        _Work([tensors[p] for p in positions]).share_out(_LIBRARY.apply_rows, codes, coded, len(coded))
    targets = {names.index(row.target) for row in rows}
    _note_writes(operands[column] for operands in tensors for column in targets)


def exchange(pairs: Sequence[_Operands]) -> None:
    """Exchanges the values of each pair bit for bit, of all of them or of none.

    Args:
        pairs (Sequence[Sequence[torch.Tensor]]): Two tensors of one dtype each, in host memory, dense, with their
            elements in one order. No memory is in the pairs twice.
    """
    if not pairs:
        return
    # Before it, for nothing may fail after it.
    _note_writes(tensor for pair in pairs for tensor in pair)
    work = _Work(pairs, in_bytes=True)
    try:
        work.share_out(_LIBRARY.exchange)
    except BaseException:
        # What the threads have left is done, and then all of it undone.
        _LIBRARY.exchange(work.tensors)
        work.start_over()
        _LIBRARY.exchange(work.tensors)
        raise


def first_nonfinite(tensors: Sequence[torch.Tensor]) -> Optional[int]:
    """Returns the index of the first tensor that holds a NaN or an infinity, or None.

    Args:
        tensors (Sequence[torch.Tensor]): In host memory, of :data:`DTYPES`, dense.
    """
    alone = [(tensor,) for tensor in tensors]
    bad: list[int] = []
    for (dtype,), positions in _by_dtypes(alone).items():
        firsts = _Work([alone[p] for p in positions]).share_out(_LIBRARY.first_nonfinite, DTYPES[dtype])
        bad += [positions[first] for first in firsts if first >= 0]
    return min(bad, default=None)


def _code(row: Row, names: Sequence[str]) -> _Row:
    """Returns a row as the library is told of it, its scale rounded as torch does it."""
    if isinstance(row, Lerp):
        row = dataclasses.replace(row, weight=ctypes.c_float(row.weight).value)
    difference = as_difference(row)
    operands = (difference.target, difference.base, difference.minuend, difference.subtrahend)
    return _Row(*map(names.index, operands), difference.scale)


def _by_dtypes(tensors: Sequence[_Operands]) -> dict[tuple[torch.dtype, ...], list[int]]:
    """Returns the positions of tensors by the dtypes of their operands."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for position, operands in enumerate(tensors):
        groups.setdefault(tuple([tensor.dtype for tensor in operands]), []).append(position)
    return groups


def _note_writes(tensors: Iterable[torch.Tensor]) -> None:
    """Tells autograd that tensors were written to. Inference tensors have no record of that."""
    for tensor in tensors:
        if not tensor.is_inference():
            # torch 2.6 takes no list.
            increment_version(tensor)
