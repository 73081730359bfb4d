# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The compiled kernels compute what torch does, bit for bit, and step aside where they cannot."""

import importlib
import itertools
import math
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_bema.averaging import chunks, kernels
from composer_bema.averaging.decay import ConstantDecay
from composer_bema.averaging.rules import EMA, Difference, Lerp, LinearStep, Row
from composer_bema.averaging.state import AverageState
from tests.averaging.test_foreach import RULES
from tests.averaging.test_kernels import LAYOUTS, bits, lay_out, special_values

BLOCK = 1024
PIECE = 64 * BLOCK
SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 0, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, 7)
FP32, BF16 = torch.float32, torch.bfloat16

compiler = (sysconfig.get_config_var('CC') or 'cc').split()[0]
needs_them = pytest.mark.skipif(kernels._compiled() is None, reason='the compiled kernels were not compiled')


@pytest.mark.skipif(shutil.which(compiler) is None or sys.platform != 'linux', reason='there is no C compiler')
def test_they_are_there_where_there_is_a_compiler():
    """The import says why they are not."""
    assert kernels._compiled() is importlib.import_module('composer_bema.averaging.compiled')


@pytest.fixture
def compiled() -> Any:
    module = kernels._compiled()
    if module is None:
        pytest.skip('the compiled kernels were not compiled')
    return module


@pytest.fixture
def four_threads(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shares even small work among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(compiled, '_A_THREAD', 1000)
    yield
    torch.set_num_threads(threads)


def by_torch(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the kernels does without those that were compiled."""
    with monkeypatch.context() as patched:
        patched.setattr(kernels, '_compiled', lambda: None)
        return function(*arguments)


def apply(rows: Sequence[Row], names: Sequence[str], tuples: Sequence[Sequence[torch.Tensor]]) -> None:
    theta, *buffers = (list(column) for column in zip(*tuples, strict=True))
    kernels.apply_step(LinearStep(tuple(rows), {}), theta, dict(zip(names[1:], buffers, strict=True)))


def refuse(*arguments: Any) -> None:
    raise AssertionError('these tensors were for the compiled kernels')


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.usefixtures('four_threads')
@pytest.mark.parametrize('theta_dtype', [FP32, BF16])
@pytest.mark.parametrize('name', RULES)
def test_a_step_has_the_bits_of_torch(monkeypatch, name, theta_dtype):
    """At every edge of what is done at once, with infinities, NaNs and subnormals among the values."""
    rule = RULES[name]
    names = ['theta', *rule.buffers]
    # theta_0 and snapshots are as narrow as the weights.
    narrow = {'theta', *rule.constants, *rule.snapshots}
    dtypes = [theta_dtype if n in narrow else FP32 for n in names]
    tuples = [[special_values(dtype, max(size, 8))[:size] for dtype in dtypes] for size in SIZES]
    for number in range(4):
        rows = rule.linear_step(number + 1, 1, number).rows
        expected = [[tensor.clone() for tensor in tensors] for tensors in tuples]
        by_torch(monkeypatch, apply, rows, names, expected)
        with monkeypatch.context() as patched:
            patched.setattr(chunks, '_share_out', lambda function, batches, tuples: refuse() if tuples else None)
            apply(rows, names, tuples)
        for tensor, wanted in zip(itertools.chain(*tuples), itertools.chain(*expected), strict=True):
            assert torch.equal(tensor.isnan(), wanted.isnan())
            assert bits(tensor.nan_to_num(123.0)) == bits(wanted.nan_to_num(123.0))


@needs_them
@settings(deadline=None, max_examples=200)
@given(
    weight=st.floats(-2, 2, width=32) | st.floats(-2, 2) | st.sampled_from([0.5, -0.5, 0.5 - 2**-30, 1 - 2**-30, 1.0]),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 2**32),
)
def test_scales_are_rounded_as_torch_rounds_them(weight, scale, seed):
    rows = (Lerp('ema', 'theta', weight), Difference('bema', 'ema', scale, 'theta', 'theta_0'))
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(37, generator=generator) for _ in range(4)]
    expected = [tensor.clone() for tensor in tensors]
    names = ['theta', 'theta_0', 'ema', 'bema']
    apply(rows, names, [tensors])
    with pytest.MonkeyPatch.context() as monkeypatch:
        by_torch(monkeypatch, apply, rows, names, [expected])
    assert all(map(torch.equal, tensors, expected))


@pytest.mark.usefixtures('four_threads')
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('theta_dtype', [FP32, BF16])
def test_layouts_are_taken_where_they_have_one_order(compiled, monkeypatch, layout, theta_dtype):
    """Those with gaps go chunk by chunk, beside others that do not."""
    rows = RULES['BEMA'].linear_step(1, 1, 1).rows
    names = ['theta', 'theta_0', 'ema', 'bema']
    shapes = [(2, 3, 5, 7), (1, 2, 2, 2), (3, 2, 64, 1024)]
    tuples = [
        [lay_out(torch.randn(shape).to(theta_dtype if n == 'theta' else FP32), layout) for n in names]
        for shape in shapes
    ]
    expected = [[tensor.clone() for tensor in tensors] for tensors in tuples]
    by_torch(monkeypatch, apply, rows, names, expected)
    taken: list[int] = []
    apply_rows = compiled.apply_rows

    def counted(rows: Any, names: Any, tensors: Sequence[Any]) -> None:
        taken.append(len(tensors))
        apply_rows(rows, names, tensors)

    monkeypatch.setattr(compiled, 'apply_rows', counted)
    apply(rows, names, tuples)
    assert taken == [0 if layout == 'gaps' else len(shapes)]
    assert all(map(torch.equal, itertools.chain(*tuples), itertools.chain(*expected)))


def test_tensors_of_unlike_dtypes_are_averaged_beside_each_other(compiled, monkeypatch):
    """theta_0 is narrow where that loses nothing; weights that the library does not know go chunk by chunk."""
    rows = RULES['BEMA'].linear_step(1, 1, 1).rows
    names = ['theta', 'theta_0', 'ema', 'bema']
    kinds = [
        (FP32, FP32, FP32, FP32),
        (torch.float64, torch.float64, torch.float64, torch.float64),
        (FP32, BF16, FP32, FP32),
        (torch.float16, torch.float16, FP32, FP32),
        (BF16, BF16, FP32, FP32),
        (torch.complex64, torch.complex64, torch.complex64, torch.complex64),
        (FP32, FP32, FP32, FP32),
    ]
    tuples = [[torch.randn(50).to(dtype) for dtype in dtypes] for dtypes in kinds]
    expected = [[tensor.clone() for tensor in tensors] for tensors in tuples]
    by_torch(monkeypatch, apply, rows, names, expected)
    apply(rows, names, tuples)
    assert all(map(torch.equal, itertools.chain(*tuples), itertools.chain(*expected)))


def test_what_they_take(compiled):
    """Sums are in fp32; bits may be copied whatever they are."""
    step = (Lerp('ema', 'theta', 0.5),)
    copy = (Lerp('ema', 'theta', 1.0),)
    names = ('theta', 'ema')
    assert all(compiled.takes(step, names, dtypes) for dtypes in [(FP32, FP32), (BF16, FP32)])
    assert not any(compiled.takes(step, names, dtypes) for dtypes in [(BF16, BF16), (FP32, BF16), (FP32, torch.half)])
    assert all(compiled.takes(copy, names, dtypes) for dtypes in [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
    assert not any(compiled.takes(copy, names, dtypes) for dtypes in [(FP32, BF16), (torch.int64, torch.int64)])


def test_values_that_are_not_in_memory_as_they_are(compiled, monkeypatch):
    """A view may negate what is there, and a subclass may hold something else."""
    negative = torch._neg_view(torch.arange(1.0, 5.0))
    conjugate = torch.complex(torch.arange(4.0), torch.ones(4)).conj()
    other = torch.arange(4.0).as_subclass(type('Other', (torch.Tensor,), {}))
    monkeypatch.setattr(compiled, '_Work', refuse)
    ema = torch.zeros(4)
    apply((Lerp('ema', 'theta', 0.5),), ('theta', 'ema'), [(negative, ema)])
    assert ema.tolist() == [-0.5, -1.0, -1.5, -2.0]
    left, right = conjugate.resolve_conj().clone(), torch.zeros(4, dtype=torch.complex64)
    kernels.exchange([conjugate], [right])
    assert torch.equal(right, left) and not conjugate.any()
    apply((Lerp('ema', 'theta', 1.0),), ('theta', 'ema'), [(other, ema)])
    assert ema.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_values_that_lie_across_words(compiled, monkeypatch):
    """A file's bytes may begin anywhere in memory."""
    memory = [bytearray(4 * 3000 + 3) for _ in range(2)]
    theta, ema = (torch.frombuffer(bytes_, dtype=FP32, offset=1 + i, count=3000) for i, bytes_ in enumerate(memory))
    theta.copy_(torch.randn(3000))
    assert theta.data_ptr() % 4 and ema.data_ptr() % 4
    monkeypatch.setattr(chunks, '_share_out', lambda function, batches, tuples: refuse() if tuples else [])
    apply((Lerp('ema', 'theta', 0.25),), ('theta', 'ema'), [(theta, ema)])
    assert torch.equal(ema, theta.clone() * 0.25)
    assert kernels.first_nonfinite([theta]) is None


@pytest.mark.parametrize(
    'write',
    [
        lambda weight: kernels.exchange([torch.zeros(5)], [weight]),
        lambda weight: apply((Lerp('ema', 'theta', 0.5),), ('theta', 'ema'), [(torch.zeros(5), weight)]),
    ],
    ids=['exchange', 'step'],
)
def test_autograd_learns_of_writes(compiled, write):
    weight = torch.nn.Parameter(torch.randn(5))
    loss = (weight * weight).sum()
    write(weight.detach())
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_inference_tensors_are_written_to(compiled):
    with torch.inference_mode():
        left, right = torch.zeros(5), torch.ones(5)
        kernels.exchange([left], [right])
        apply((Lerp('ema', 'theta', 0.5),), ('theta', 'ema'), [(left, right)])
    assert right.tolist() == [0.5] * 5


# --------------------------------------------------------------------------------------------------------- exchanges


@pytest.mark.usefixtures('four_threads')
@pytest.mark.parametrize('dtype', [FP32, BF16, torch.float64, torch.int64, torch.int16, torch.uint8, torch.complex128])
def test_an_exchange_is_bit_exact_at_every_edge(monkeypatch, dtype):
    monkeypatch.setattr(chunks, 'exchange', refuse)
    left, right = ([special_values(dtype, max(size, 8))[:size] for size in SIZES] for _ in range(2))
    was_left, was_right = list(map(bits, left)), list(map(bits, right))
    kernels.exchange(left, right)
    assert (list(map(bits, left)), list(map(bits, right))) == (was_right, was_left)


@pytest.mark.parametrize('how_far', ['nothing', 'half', 'all'])
def test_an_exchange_that_is_broken_off_has_done_nothing(compiled, monkeypatch, how_far):
    pairs = [[torch.randn(size), torch.randn(size)] for size in SIZES]
    before = [[tensor.clone() for tensor in pair] for pair in pairs]

    def broken_off(work: Any, function: Callable[..., Any]) -> None:
        if how_far == 'half':
            # Down to within the largest of them.
            largest = SIZES.index(max(SIZES))
            begun = [*pairs[:largest], [tensor[: 2 * PIECE // 4] for tensor in pairs[largest]]]
            some = compiled._Work(begun, in_bytes=True)
            function(some.tensors)
            # One more is asked for than there are.
            work._num_taken[0] = some._num_taken[0] - 1
            assert torch.equal(pairs[largest][0][: PIECE // 2], before[largest][1][: PIECE // 2])
        elif how_far == 'all':
            function(work.tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled._Work, 'share_out', broken_off)
    with pytest.raises(KeyboardInterrupt):
        compiled.exchange(pairs)
    assert all(map(torch.equal, itertools.chain(*pairs), itertools.chain(*before)))


def test_a_swap_whose_exchange_fails_changes_nothing(compiled, monkeypatch):
    model = torch.nn.Linear(3, 2)
    state = AverageState(EMA(ConstantDecay(0.5)))
    state.start(model)
    torch.nn.init.ones_(model.weight)
    state.update(model, step=1)
    before = model.weight.clone(), state.average()['weight'].clone()
    share_out = compiled.share_out

    def fail(*arguments: Any, **more: Any) -> None:
        share_out(*arguments, **more)
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(compiled, 'share_out', fail)
        state.swap_in(model)
    assert not state.swapped
    assert torch.equal(model.weight, before[0]) and torch.equal(state.average()['weight'], before[1])


def test_no_exchange_is_done_beside_one_that_is_refused(compiled):
    left = [torch.zeros(3), torch.zeros(1).expand(3), torch.zeros(3)]
    right = [torch.ones(3) for _ in left]
    with pytest.raises(RuntimeError, match='more than one element'):
        kernels.exchange(left, right)
    assert not any(tensor.any() for tensor in left) and all(tensor.all() for tensor in right)


# ------------------------------------------------------------------------------------------------------------- guard


@pytest.mark.usefixtures('four_threads')
@pytest.mark.parametrize('dtype', [FP32, BF16])
def test_a_bad_value_is_found_at_every_edge(monkeypatch, dtype):
    monkeypatch.setattr(chunks, '_sum_dtype', refuse)
    tensors = [torch.randn(size).to(dtype) for size in SIZES]
    assert kernels.first_nonfinite(tensors) is None
    for index in reversed(range(len(SIZES))):
        for place in {0, SIZES[index] // 2, SIZES[index] - 1}:
            if SIZES[index]:
                was, tensors[index][place] = tensors[index][place].clone(), -math.inf
                assert kernels.first_nonfinite(tensors) == index
                tensors[index][place] = was
        if SIZES[index]:
            tensors[index][-1] = math.nan


@needs_them
def test_every_value_of_sixteen_bits_is_judged():
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
    bad = [kernels.first_nonfinite([value]) is not None for value in values.split(1)]
    assert torch.equal(torch.tensor(bad), ~values.isfinite())
    # With bits set that 16 do not have.
    wide = (values.view(torch.int16).to(torch.int32) << 16 | torch.arange(2**16) % 3).to(torch.int32).view(FP32)[::17]
    bad = [kernels.first_nonfinite([value]) is not None for value in wide.split(1)]
    assert torch.equal(torch.tensor(bad), ~wide.isfinite())
    assert kernels.first_nonfinite([torch.tensor([0x7F800001], dtype=torch.int32).view(FP32)]) == 0


def test_the_first_bad_tensor_is_named_whoever_finds_it(compiled):
    """Of what is compiled for, and of what is not."""
    tensors = [torch.ones(4, dtype=dtype) for dtype in (FP32, torch.float64, BF16, torch.float16, FP32)]
    for index in reversed(range(len(tensors))):
        tensors[index][1] = math.nan
        assert kernels.first_nonfinite(tensors) == index


# ----------------------------------------------------------------------------------------------------------- library


def test_nothing_is_nothing(compiled):
    compiled.apply_rows((Lerp('ema', 'theta', 0.5),), ('theta', 'ema'), [])
    compiled.exchange([])
    assert compiled.first_nonfinite([]) is None


LACKS = {
    'missing': 'no C compiler',
    'broken': 'cannot be used',
    'without a source': 'cannot be used',
    'of another source': 'install composer_bema anew',
    'of another rounding': 'rounds products and sums one by one',
}


@pytest.mark.parametrize('kind', LACKS)
def test_a_library_that_cannot_be_used_is_no_error(compiled, monkeypatch, tmp_path: Path, kind):
    """The package works without it, and says why it is not used to who asks."""
    if kind == 'missing':
        monkeypatch.setattr(compiled.importlib.util, 'find_spec', lambda name: None)
    elif kind == 'broken':
        broken = tmp_path / '_compiled_kernels.abi3.so'
        broken.write_bytes(b'no library')
        spec = compiled.importlib.util.spec_from_file_location('broken', broken)
        monkeypatch.setattr(compiled.importlib.util, 'find_spec', lambda name: spec)
    elif kind == 'of another rounding':
        monkeypatch.setattr(compiled.platform, 'machine', lambda: 'x86_64')
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'NO AVX')
    else:
        monkeypatch.setattr(compiled, '_SOURCE', tmp_path / 'compiled_kernels.c')
        if kind == 'of another source':
            compiled._SOURCE.write_text('/* another */\n')
    with pytest.raises(ImportError, match=LACKS[kind]):
        compiled._load()


def test_the_kernels_go_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'composer_bema.averaging.compiled', None)
    monkeypatch.delattr('composer_bema.averaging.compiled', raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kernels._compiled.__wrapped__() is None
