# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A GPU without Triton: torch's `_foreach` functions do what the chunks do, batch by batch. They run on the CPU too."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from composer_bema.averaging import chunks, foreach, kernels
from composer_bema.averaging.decay import ConstantDecay
from composer_bema.averaging.rules import BEMA, DEMA, EMA, OUEMA, LinearStep, bema_rule
from composer_bema.averaging.windows import SWAWindow, Window
from tests.averaging.test_kernels import LAYOUTS, LargestAllocation, lay_out

BATCH = 64
RULES = {
    'EMA': EMA(ConstantDecay(0.25)),
    'near the weights': EMA(ConstantDecay(0.75)),
    'copy': EMA(ConstantDecay(1.0)),
    'BEMA': BEMA(ConstantDecay(0.5), ConstantDecay(0.25)),
    'DEMA': DEMA(ConstantDecay(0.25)),
    'OUEMA': OUEMA(ConstantDecay(0.5), ConstantDecay(0.25)),
    'window': Window(2),
    'periods': SWAWindow(2, periods=2),
}


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch, by_torch_alone: None) -> None:
    """Takes the CPU for an accelerator, on which Triton is missing, with small batches."""
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(kernels, '_ACCELERATORS', ('cpu',))
    monkeypatch.setattr(chunks, '_BATCH', BATCH)
    monkeypatch.setattr(chunks, '_CPU_CHUNK', BATCH // 2)
    monkeypatch.setattr(kernels, '_fused', lambda: None)


def apply(step: LinearStep, names: Sequence[str], tuples: Sequence[Sequence[torch.Tensor]]) -> None:
    theta, *buffers = (list(column) for column in zip(*tuples, strict=True))
    kernels.apply_step(step, theta, dict(zip(names[1:], buffers, strict=True)))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The elements of each batch."""
    sizes: list[int] = []
    apply_rows = foreach.apply_rows

    def counted(rows: Any, operands: Any) -> None:
        sizes.append(sum(tensor.numel() for tensor in operands['theta']))
        apply_rows(rows, operands)

    monkeypatch.setattr(foreach, 'apply_rows', counted)
    return sizes


@pytest.mark.parametrize('theta_dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', RULES)
def test_batches_agree_with_chunks(request, name, layout, theta_dtype):
    rule = RULES[name]
    names, step = ['theta', *rule.buffers], rule.linear_step(1, 1, 1)
    shapes = [(1, 2, 2, 2), (2, 2, 3, 5), (1, 1, 1, 1), (2, 3, 5, 7)]
    tuples = [
        [lay_out(torch.randn(shape, dtype=theta_dtype if n == 'theta' else torch.float32), layout) for n in names]
        for shape in shapes
    ]
    expected = [[tensor.clone() for tensor in tensors] for tensors in tuples]
    apply(step, names, expected)
    request.getfixturevalue('without_triton')
    sizes = request.getfixturevalue('batches')
    apply(step, names, tuples)
    # The last tensor has seven chunks; what has gaps, as all but the one element have, is not for batches.
    assert len(sizes) > 3 if layout != 'gaps' else sizes == [1]
    for tensors, wanted in zip(tuples, expected, strict=True):
        for tensor, want in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)


@pytest.mark.usefixtures('without_triton')
def test_no_temporary_is_larger_than_a_chunk_and_no_batch_than_its_limit(batches):
    names = ['theta', 'theta_0', 'ema', 'bema']
    step = RULES['BEMA'].linear_step(1, 1, 1)
    tuples = [[torch.randn(n).bfloat16(), *(torch.randn(n) for _ in range(3))] for n in (1000, *[7] * 30)]
    with LargestAllocation() as watch:
        apply(step, names, tuples)
    assert 0 < watch.numel <= BATCH // 2
    assert max(batches) <= BATCH
    # Small tensors share batches.
    assert len(batches) <= 2 * (1000 + 7 * 30) / BATCH


def test_dtypes_do_not_mix_in_a_batch(without_triton):
    tuples = [(torch.zeros(2, dtype=dtype),) for dtype in (torch.float32, torch.float64, torch.float32)]
    assert [
        [t.dtype for (t,) in batch]
        for batch in chunks._batches([[alone] for alone in tuples], most=64, smallest_alone=64)
    ] == [
        [torch.float32, torch.float32],
        [torch.float64],
    ]


def test_a_large_chunk_is_a_batch_of_its_own_and_a_batch_has_an_end(without_triton):
    tuples = [(torch.zeros(size),) for size in (3, 9, 4, 2, 1)]
    sizes = [
        [t.numel() for (t,) in batch]
        for batch in chunks._batches([[alone] for alone in tuples], most=7, smallest_alone=8)
    ]
    assert sizes == [[9], [3, 4], [2, 1]]


@pytest.mark.usefixtures('by_torch_alone')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_in_host_memory_are_averaged_alike_alone_and_together(dtype):
    """Small ones go in batches, and those that are large or alone do not."""
    generator = torch.Generator().manual_seed(3)
    sizes = (1, 5, chunks._SMALL - 1, chunks._SMALL, chunks._CPU_CHUNK + 3, 0, 7)
    theta = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    kept = torch.promote_types(dtype, torch.float32)
    step = bema_rule().linear_step(10, 1.0, 3)

    def averages(groups):
        buffers = {name: [t.to(kept, copy=True) for t in theta] for name in ('theta_0', 'ema', 'bema')}
        for name, factor in (('theta_0', 0.5), ('ema', 0.25)):
            torch._foreach_mul_(buffers[name], factor)
        for group in groups:
            some = {name: [tensors[i] for i in group] for name, tensors in buffers.items()}
            kernels.apply_step(step, [theta[i] for i in group], some)
        return buffers['ema'] + buffers['bema']

    together = averages([range(len(sizes))])
    alone = averages([[i] for i in range(len(sizes))])
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_a_missing_triton_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.delitem(sys.modules, 'composer_bema.averaging.fused', raising=False)
    monkeypatch.delattr('composer_bema.averaging.fused', raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kernels._fused.__wrapped__() is None


def test_a_triton_that_does_not_work_is_said_once(monkeypatch):
    fused = pytest.importorskip('composer_bema.averaging.fused')

    def fail() -> None:
        raise RuntimeError('Failed to find C compiler.')

    monkeypatch.setattr(fused, 'probe', fail)
    with pytest.warns(UserWarning, match='slower kernels.*Failed to find C compiler'):
        assert kernels._fused.__wrapped__() is None
