# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

# What Triton compiles is written in Python's syntax and has rules of its own.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportInvalidTypeForm=false

"""The kernels of :mod:`.fused`, on the device: each program does one block of elements of one tensor.

The tables and codes that they take are explained where they are made, in :mod:`.fused`.
"""

import triton
import triton.language as tl

__all__ = ['exchange_kernel', 'nonfinite_kernel', 'step_kernel']


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Returns an address as a pointer; wide loads need the promise that it is a multiple of what they load."""
    if DTYPE == 0:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 2 * VECTOR)
    elif DTYPE == 1:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 2 * VECTOR)
    elif DTYPE == 2:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * VECTOR)
    elif DTYPE == 3:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float64)), 8 * VECTOR)
    elif DTYPE == 4:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int8)), VECTOR)
    elif DTYPE == 5:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 2 * VECTOR)
    elif DTYPE == 6:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 4 * VECTOR)
    else:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 8 * VECTOR)
    return pointer


@triton.jit
def _locate(
    table,
    tensor_of_block,
    DTYPES: tl.constexpr,
    OPERANDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns where the operands of this block begin, the elements from there to the tensor's end, its position."""
    block = tl.program_id(0)
    entry = table + tl.load(tensor_of_block + block).to(tl.int64) * (3 + OPERANDS)
    start = (block - tl.load(entry)) * BLOCK
    pointers = ()
    for i in tl.static_range(OPERANDS):
        pointers = pointers + (_pointer(tl.load(entry + 3 + i), (DTYPES >> (4 * i)) & 15, VECTOR) + start,)
    return pointers, tl.load(entry + 1) - start, tl.load(entry + 2)


# A mask splits a wide load into its elements, so whole blocks, nearly all of a model, go without one.


@triton.jit(do_not_specialize=range(2, 10))
def step_kernel(
    table,
    tensor_of_block,
    scale_0: tl.int64,
    scale_1: tl.int64,
    scale_2: tl.int64,
    scale_3: tl.int64,
    scale_4: tl.int64,
    scale_5: tl.int64,
    scale_6: tl.int64,
    scale_7: tl.int64,
    ROWS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    DTYPES: tl.constexpr,
    OPERANDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Applies rows to a block; their scales come as the bits of fp64 numbers."""
    pointers, left, _ = _locate(table, tensor_of_block, DTYPES, OPERANDS, VECTOR, BLOCK)
    scales = (scale_0, scale_1, scale_2, scale_3, scale_4, scale_5, scale_6, scale_7)
    offsets = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _step_block(pointers, scales, offsets, None, ROWS, NUM_ROWS, OPERANDS)
    else:
        _step_block(pointers, scales, offsets, offsets < left, ROWS, NUM_ROWS, OPERANDS)


@triton.jit
def _step_block(pointers, scales, offsets, mask, ROWS: tl.constexpr, NUM_ROWS: tl.constexpr, OPERANDS: tl.constexpr):
    # What is loaded and not used, such as the old value of a Difference's target, the compiler drops.
    values = ()
    for i in tl.static_range(OPERANDS):
        values = values + (tl.load(pointers[i] + offsets, mask=mask),)
    for row in tl.static_range(NUM_ROWS):
        values = _apply_row(pointers, values, scales[row], offsets, mask, (ROWS >> (16 * row)) & 0xFFFF)


@triton.jit
def _apply_row(pointers, values, scale, offsets, mask, ROW: tl.constexpr):
    """Returns the values after a row. They are rounded to the target's dtype first, as on the CPU, the result once."""
    TARGET: tl.constexpr = ROW & 15
    BASE: tl.constexpr = (ROW >> 4) & 15
    MINUEND: tl.constexpr = (ROW >> 8) & 15
    SUBTRAHEND: tl.constexpr = (ROW >> 12) & 15
    dtype: tl.constexpr = pointers[TARGET].dtype.element_ty
    result = values[BASE].to(dtype)
    if MINUEND != SUBTRAHEND:
        # The constexpr has to be on the left: a dtype equals none.
        wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
        difference = values[MINUEND].to(dtype).to(wide) - values[SUBTRAHEND].to(dtype).to(wide)
        factor = scale.to(tl.int64).to(tl.float64, bitcast=True).to(wide)
        result = (result.to(wide) + factor * difference).to(dtype)
    tl.store(pointers[TARGET] + offsets, result, mask=mask)
    return values[:TARGET] + (result,) + values[TARGET + 1 :]


@triton.jit
def exchange_kernel(
    table,
    tensor_of_block,
    DTYPES: tl.constexpr,
    OPERANDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exchanges the two operands of a block."""
    pointers, left, _ = _locate(table, tensor_of_block, DTYPES, OPERANDS, VECTOR, BLOCK)
    offsets = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _exchange_block(pointers[0] + offsets, pointers[1] + offsets, None)
    else:
        _exchange_block(pointers[0] + offsets, pointers[1] + offsets, offsets < left)


@triton.jit
def _exchange_block(a, b, mask):
    a_values = tl.load(a, mask=mask)
    b_values = tl.load(b, mask=mask)
    tl.store(a, b_values, mask=mask)
    tl.store(b, a_values, mask=mask)


@triton.jit
def nonfinite_kernel(
    table,
    tensor_of_block,
    first_bad,
    DTYPES: tl.constexpr,
    OPERANDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lowers ``first_bad`` to the tensor's position if a value of the block is not finite."""
    pointers, left, position = _locate(table, tensor_of_block, DTYPES, OPERANDS, VECTOR, BLOCK)
    offsets = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _note_nonfinite(tl.load(pointers[0] + offsets), first_bad, position)
    else:
        _note_nonfinite(tl.load(pointers[0] + offsets, mask=offsets < left, other=0.0), first_bad, position)


@triton.jit
def _note_nonfinite(values, first_bad, position):
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    # No comparison with a NaN is true.
    is_bad = tl.where(tl.abs(values) < float('inf'), 0, 1)
    tl.atomic_min(first_bad, position.to(tl.int32), mask=tl.max(is_bad, axis=0) > 0, sem='relaxed')
