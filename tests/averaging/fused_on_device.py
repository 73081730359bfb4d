# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The kernels that take all tensors in one launch do what those do that take them one by one.

Run by `test_fused.py`, in a process of its own: on a GPU, or with `TRITON_INTERPRET=1` by Triton's interpreter on the
CPU, which changes Triton for the whole process.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_bema.averaging import decay, kernels, rules
from composer_bema.averaging.rules import Difference, Lerp, LinearStep, Row
from composer_bema.averaging.state import AverageState
from composer_bema.averaging.windows import SWAWindow, Window

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
BLOCK = 64
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BEMA_ROWS = (Lerp('ema', 'theta', 0.25), Difference('bema', 'ema', 0.5, 'theta', 'theta_0'))
BEMA_NAMES = ('theta', 'theta_0', 'ema', 'bema')
# What a model's weights and buffers may be: theta, and the others.
DTYPES = [(FP32, FP32), (BF16, FP32), (FP16, FP32), (FP64, FP64), (FP32, FP64)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels, with blocks of which a small tensor has several."""
    from composer_bema.averaging import fused

    monkeypatch.setattr(fused, '_BLOCK', BLOCK)
    fused._plan.cache_clear()
    yield fused
    fused._plan.cache_clear()


@pytest.fixture
def launches(fused: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    run = fused._run

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        run(kernel, *arguments, **constants)

    monkeypatch.setattr(fused, '_run', counted)
    return names


@pytest.fixture
def at_once(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes :mod:`.kernels` send what it can to the kernels; under the interpreter, from the CPU."""
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
        monkeypatch.setattr(kernels, '_ACCELERATORS', ('cpu',))
        monkeypatch.setattr(kernels, '_fused', lambda: fused)


def in_memory(shape: Sequence[int], dtype: torch.dtype, layout: str = 'contiguous', offset: int = 0) -> torch.Tensor:
    """Random values, ``offset`` elements into memory that holds 99 elsewhere."""
    order = {'contiguous': range(len(shape)), 'reversed': range(len(shape) - 1, -1, -1)}[layout]
    memory = torch.full((math.prod(shape) + offset + 3,), 99.0, dtype=dtype, device=DEVICE)
    tensor = memory[offset : offset + math.prod(shape)].view([shape[i] for i in order])
    return tensor.permute(*order).copy_(torch.randn(*shape, dtype=FP64)) if shape else tensor.copy_(torch.randn(()))


def untouched(tensor: torch.Tensor) -> bool:
    """Whether the memory around a tensor is as :func:`in_memory` left it."""
    memory, start = tensor._base, tensor.storage_offset()
    assert memory is not None
    return bool((memory[:start] == 99).all() and (memory[start + tensor.numel() :] == 99).all())


def copies(tuples: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[tensor.to('cpu', copy=True) for tensor in tensors] for tensors in tuples]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_one_by_one(
    fused: Any, rows: Sequence[Row], names: Sequence[str], tuples: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Applies the rows, and compares each tensor with the CPU's chunk by chunk."""
    expected = copies(tuples)
    # Of all that meets in an element, as it is scaled: a result may be a small difference of large numbers.
    factor = max([1.0, *(abs(row.scale) for row in rows if isinstance(row, Difference))])
    scales = [factor * sum(tensor.double().abs() for tensor in tensors) for tensors in expected]
    columns = zip(*expected, strict=True) if expected else [()] * len(names)
    theta, *others = (list(column) for column in columns)
    kernels.apply_step(LinearStep(tuple(rows), {}), theta, dict(zip(names[1:], others, strict=True)))
    fused.apply_rows(rows, names, tuples)
    written = {row.target for row in rows}
    for tensors, wanted, scale in zip(tuples, expected, scales, strict=True):
        for name, tensor, want in zip(names, tensors, wanted, strict=True):
            if name in written:
                error = (tensor.cpu().double() - want.double()).abs()
                assert (error <= 2 * torch.finfo(tensor.dtype).eps * scale).all(), name
            else:
                assert bits(tensor) == bits(want), name
            assert untouched(tensor), name


# ------------------------------------------------------------------------------------------------------------- the rows

LIST_OF_TENSORS = st.lists(
    st.tuples(
        st.sampled_from([(), (0,), (1,), (BLOCK - 1,), (BLOCK,), (3, 0, 2), (2 * BLOCK,), (5, 3, 7, 2), (3, BLOCK)]),
        st.sampled_from(DTYPES),
        st.sampled_from([FP32, BF16]),
        st.sampled_from(['contiguous', 'reversed']),
        st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 8]), min_size=4, max_size=4),
    ),
    max_size=5,
)
CONSTANT = decay.ConstantDecay
RULES = st.builds(
    lambda make, alpha, beta: make(CONSTANT(alpha), CONSTANT(beta)),
    st.sampled_from([rules.BEMA, rules.OUEMA, lambda _, beta: rules.EMA(beta), lambda _, beta: rules.DEMA(beta)]),
    st.sampled_from([0.0, 0.2, 0.9, 1 / 3]),
    st.sampled_from([0.0, 1e-6, 0.1, 0.5, 2 / 3, 1 - 1e-9, 1.0]),
)


@settings(max_examples=60)
@given(rule=RULES, tensors=LIST_OF_TENSORS, seed=st.integers(0, 99))
def test_every_rule_over_any_list_of_tensors(rule, tensors, seed):
    """Of any dtypes, shapes, addresses and dense layouts, in one list."""
    from composer_bema.averaging import fused

    torch.manual_seed(seed)
    names = ['theta', *rule.buffers]
    tuples = []
    for shape, (theta, other), theta_0, layout, offsets in tensors:
        dtypes = dict.fromkeys(names, other) | {'theta': theta, 'theta_0': theta_0}
        tuples.append(
            [in_memory(shape, dtypes[name], layout, offset) for name, offset in zip(names, offsets, strict=False)]
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, '_BLOCK', BLOCK)
        fused._plan.cache_clear()
        assert_as_one_by_one(fused, rule.linear_step(1, 1, 0).rows, names, tuples)
    fused._plan.cache_clear()


@pytest.mark.parametrize('window', [Window(1), Window(3, '1-sqrt'), Window(20), SWAWindow(2, 3)], ids=str)
def test_windows_of_any_size(fused, window):
    """A window of twenty names more operands than a launch has bits for, and its rows need several launches."""
    names = ['theta', *window.buffers]
    tuples = [[in_memory(shape, FP32) for _ in names] for shape in [(BLOCK + 3,), (2, 5)]]
    for update in range(min(2 * len(names), 24)):
        for tensors in tuples:
            tensors[0].add_(0.1)
        assert_as_one_by_one(fused, window.linear_step(update, 1, update).rows, names, tuples)


def test_rows_see_the_rows_before_them(fused):
    """0 + 1/4 (8 - 0) = 2, and 2 + 1/2 (8 - 0) = 6."""
    theta, *buffers = (torch.full((3,), value, device=DEVICE) for value in (8.0, 0.0, 0.0, 0.0))
    fused.apply_rows(BEMA_ROWS, BEMA_NAMES, [[theta, *buffers]])
    assert [tensor.tolist() for tensor in buffers] == [[0.0] * 3, [2.0] * 3, [6.0] * 3]


def test_an_average_close_to_the_weights_starts_from_them(fused):
    """1e8 + (1 - 1e-9) (1 - 1e8) is 0 in fp32, for which 1 - 1e8 is -1e8; 1 + 1e-9 (1e8 - 1) is 1.1."""
    theta, ema = (torch.tensor([value], device=DEVICE) for value in (1.0, 1e8))
    fused.apply_rows([Lerp('ema', 'theta', 1 - 1e-9)], ['theta', 'ema'], [[theta, ema]])
    assert ema.item() == pytest.approx(1.1)


def test_averages_of_16_bits_are_rounded_once(fused):
    """Of values whose average has 8 bits: what the interpreter rounds to bf16 is not what a GPU does."""
    for dtype in (FP16, BF16):
        theta, target = (torch.tensor(values, dtype=dtype, device=DEVICE) for values in ([3.0, -8.0], [1.0, 4.0]))
        fused.apply_rows([Lerp('ema', 'theta', 0.25)], ['theta', 'ema'], [[theta, target]])
        assert target.tolist() == [1.5, 1.0]


def test_double_precision_is_kept_throughout(fused):
    """The scale too: 0.1 in fp32 is wrong in the eighth digit."""
    theta, ema = (torch.tensor([value], dtype=FP64, device=DEVICE) for value in (1.0, 0.0))
    fused.apply_rows([Lerp('ema', 'theta', 0.1)], ['theta', 'ema'], [[theta, ema]])
    assert ema.item() == 0.1
    fused.apply_rows([Lerp('ema', 'theta', 1 - 1e-12)], ['theta', 'ema'], [[theta, ema]])
    assert ema.item() == pytest.approx(1 - 0.9e-12, abs=2e-16)


@pytest.mark.parametrize(('dtype', 'source_dtype'), [(FP32, FP32), (BF16, BF16), (FP32, BF16), (FP64, FP32)])
def test_a_weight_of_one_copies(fused, dtype, source_dtype):
    """Over whatever was there, and bit for bit where dtypes agree."""
    theta = torch.tensor([-0.0, math.inf, math.nan, 3.0], dtype=source_dtype, device=DEVICE)
    latest = torch.full((4,), math.nan, dtype=dtype, device=DEVICE)
    fused.apply_rows([Lerp('latest', 'theta', 1.0)], ['theta', 'latest'], [[theta, latest]])
    if dtype == source_dtype:
        assert bits(latest) == bits(theta)
    assert torch.equal(latest.signbit(), theta.signbit())
    assert torch.equal(latest.nan_to_num(7.0, 8.0), theta.to(dtype).nan_to_num(7.0, 8.0))


def test_a_probe_tries_every_kernel_and_its_numbers(fused, launches, monkeypatch):
    fused.probe(DEVICE)
    assert set(launches) == {'step_kernel', 'exchange_kernel', 'nonfinite_kernel'}
    monkeypatch.setattr(fused, 'exchange', lambda pairs: None)
    with pytest.raises(RuntimeError, match='a trial of them gave'):
        fused.probe(DEVICE)


def test_many_small_tensors_take_one_launch(fused, launches):
    tuples = [[in_memory((1 + i % 7,), dtype) for dtype in (BF16, BF16, FP32, FP32)] for i in range(400)]
    assert_as_one_by_one(fused, BEMA_ROWS, BEMA_NAMES, tuples)
    assert launches == ['step_kernel']


def test_a_launch_for_each_combination_of_dtypes_and_alignment(fused, launches):
    tuples = [
        [in_memory((9,), dtype, offset=offset) for dtype in (theta, FP32)]
        for theta, offset in [(FP32, 0), (BF16, 0), (FP32, 0), (FP32, 1), (FP32, 4), (BF16, 0)]
    ]
    assert_as_one_by_one(fused, [Lerp('ema', 'theta', 0.1)], ['theta', 'ema'], tuples)
    assert len(launches) == 3


def test_tables_are_made_once_for_the_same_memory(fused):
    tuples = [[in_memory((70,), FP32) for _ in range(4)] for _ in range(3)]
    for _ in range(3):
        assert_as_one_by_one(fused, BEMA_ROWS, BEMA_NAMES, tuples)
    assert fused._plan.cache_info().misses == 1
    tuples[1][2] = tuples[1][2].clone()
    fused.apply_rows(BEMA_ROWS, BEMA_NAMES, tuples)
    assert fused._plan.cache_info().misses == 2


@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_tensors_of_several_devices(fused, launches):
    """A launch each, whichever device is the current one."""
    tuples = [[torch.randn(70, device=f'cuda:{index}') for _ in range(4)] for index in (0, 1, 0)]
    expected = copies(tuples)
    fused.apply_rows(BEMA_ROWS, BEMA_NAMES, tuples)
    for wanted, tensors in zip(expected, tuples, strict=True):
        fused.apply_rows(BEMA_ROWS, BEMA_NAMES, [on_first := [tensor.to('cuda:0') for tensor in wanted]])
        assert [bits(tensor) for tensor in tensors] == [bits(tensor) for tensor in on_first]
    assert len(launches) == 2 + 3
    tuples[1][2][3] = math.nan
    assert fused.first_nonfinite([tensors[2] for tensors in tuples]) == 1


def test_an_element_beyond_two_to_the_31(fused, monkeypatch):
    """The last block alone is exchanged: its offset, though not its number, needs 64 bits."""
    block, numel = 2048, 2**31 + 5
    monkeypatch.setattr(fused, '_BLOCK', block)
    a, b = (torch.empty(numel, dtype=torch.int8, device=DEVICE) for _ in range(2))
    last = numel // block * block
    a[last - 1 :], b[last - 1 :] = 1, 2
    (launch,) = fused._plan((fused._as_words([a, b]),))
    assert len(launch.tensor_of_block) == numel // block + 1
    launch.table[0, 0] = -(numel // block)
    fused._run(fused.exchange_kernel, launch._replace(tensor_of_block=launch.tensor_of_block[:1].clone()))
    assert a[last - 1 :].tolist() == [1] + [2] * (numel - last)
    assert b[last - 1 :].tolist() == [2] + [1] * (numel - last)


# ------------------------------------------------------------------------------------------------------------- exchange


@pytest.mark.parametrize(
    'dtype', [torch.bool, torch.int8, FP16, BF16, FP32, FP64, torch.int64, torch.complex64, torch.complex128], ids=str
)
def test_an_exchange_is_bit_exact(fused, launches, dtype):
    """Random bit patterns: payloads of NaNs, subnormals and the sign of zero are kept."""

    def random(numel: int) -> torch.Tensor:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (numel * dtype.itemsize,), dtype=torch.uint8)
        return raw.view(dtype).to(DEVICE)

    pairs = [(random(numel), random(numel)) for numel in (1, BLOCK, 3 * BLOCK + 5, 0)]
    before = [(bits(a), bits(b)) for a, b in pairs]
    fused.exchange(pairs)
    assert [(bits(b), bits(a)) for a, b in pairs] == before
    assert launches == ['exchange_kernel']


def test_an_exchange_is_seen_by_autograd(fused):
    """A backward pass may not use weights that are not those of its forward pass."""
    weight = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        fused.exchange([(weight, torch.zeros(3, device=DEVICE))])
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------ the guard


@pytest.mark.parametrize('dtype', [FP16, BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_the_first_bad_tensor_is_found(fused, launches, dtype, bad):
    tensors = [torch.full((numel,), torch.finfo(dtype).max, dtype=dtype, device=DEVICE) for numel in (5, 0, 200, 64)]
    assert fused.first_nonfinite(tensors) is None
    tensors[3][63] = bad
    assert fused.first_nonfinite(tensors) == 3
    for element in (199, 63, 0):
        tensors[2].fill_(-torch.finfo(dtype).max)[element] = bad
        assert fused.first_nonfinite(tensors) == 2
    assert launches == ['nonfinite_kernel'] * 5


def test_the_first_bad_tensor_is_found_across_launches(fused):
    dtypes = [FP64, FP32, FP64, BF16, FP32]
    tensors = [torch.ones(70, dtype=dtype, device=DEVICE) for dtype in dtypes]
    for index in (4, 3, 2, 1, 0):
        tensors[index][69] = math.nan
        assert fused.first_nonfinite(tensors) == index
    assert fused.first_nonfinite([]) is None
    assert fused.first_nonfinite([torch.empty(0, device=DEVICE)]) is None


# ------------------------------------------------------------------------------------------------------------- the path


def mixed_tuples() -> list[list[torch.Tensor]]:
    """Of all kinds: dense ones, one with gaps, layouts that differ, and integers."""
    dense = [[in_memory(shape, FP32) for _ in range(4)] for shape in [(70,), (), (0,), (4, 5)]]
    gaps = [in_memory((6, 8), FP32)[:, ::2] for _ in range(4)]
    unlike = [in_memory((4, 5), FP32, layout) for layout in ('contiguous', 'reversed', 'contiguous', 'contiguous')]
    return [dense[0], gaps, *dense[1:3], unlike, dense[3]]


@pytest.mark.usefixtures('at_once')
def test_a_step_takes_what_it_can_at_once_and_the_rest_one_by_one(launches):
    tuples = mixed_tuples()
    expected = copies(tuples)
    for group, split in ((tuples, True), (expected, False)):
        theta, *others = (list(column) for column in zip(*group, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            if not split:
                patch.setattr(kernels, '_ACCELERATORS', ())
            kernels.apply_step(LinearStep(BEMA_ROWS, {}), theta, dict(zip(BEMA_NAMES[1:], others, strict=True)))
    assert launches == ['step_kernel']
    for tensors, wanted in zip(tuples, expected, strict=True):
        for tensor, want in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor.cpu(), want, rtol=0, atol=1e-6)


@pytest.mark.usefixtures('at_once')
def test_integers_and_complex_numbers_are_averaged_one_by_one(launches):
    counts = torch.tensor([2**53 + 1], device=DEVICE), torch.tensor([0], device=DEVICE)
    kernels.apply_step(LinearStep((Lerp('latest', 'theta', 1.0),), {}), [counts[0]], {'latest': [counts[1]]})
    assert counts[1].item() == 2**53 + 1
    theta, ema = (torch.tensor([value], device=DEVICE) for value in (4j, 0j))
    kernels.apply_step(LinearStep((Lerp('ema', 'theta', 0.25),), {}), [theta], {'ema': [ema]})
    assert ema.item() == 1j
    assert not launches


@pytest.mark.usefixtures('at_once')
def test_an_exchange_takes_what_it_can_at_once(launches):
    tuples = [tensors[:2] for tensors in mixed_tuples()]
    tuples.append([torch.tensor([value], device=DEVICE) for value in (3, 4)])
    before = copies(tuples)
    left, right = zip(*tuples, strict=True)
    kernels.exchange(left, right)
    assert Counter(launches) == {'exchange_kernel': 2}
    for (a, b), (was_a, was_b) in zip(tuples, before, strict=True):
        assert torch.equal(a.cpu(), was_b)
        assert torch.equal(b.cpu(), was_a)


@pytest.mark.usefixtures('at_once')
def test_an_exchange_of_shared_memory_goes_in_order(launches):
    """Two names of one piece of memory: 1 goes to the first buffer, and what came from there to the second."""
    live = torch.tensor([1.0, 1.0], device=DEVICE)
    first, second = (torch.tensor([value] * 2, device=DEVICE) for value in (2.0, 3.0))
    left, right = [live, live[:]], [first, second]
    groups = kernels.exchange_groups(left, right)
    assert groups == [[0], [1]]
    for (i,) in groups:
        kernels.exchange([left[i]], [right[i]])
    assert [tensor.tolist() for tensor in (live, first, second)] == [[3.0] * 2, [1.0] * 2, [2.0] * 2]
    assert launches == ['exchange_kernel'] * 2


@pytest.mark.usefixtures('at_once')
def test_the_guard_looks_at_all_tensors_on_either_path(launches):
    tensors = [torch.ones(5, device=DEVICE), torch.ones(6, 6, device=DEVICE)[:, ::2], torch.ones(5, device=DEVICE)]
    tensors.append(torch.ones(3, dtype=torch.complex64, device=DEVICE))
    assert kernels.first_nonfinite(tensors) is None
    for index in (3, 2, 1, 0):
        tensors[index].view(-1)[-1] = math.nan if index != 1 else 1.0
        if index == 1:
            tensors[1][5, 2] = math.inf
        assert kernels.first_nonfinite(tensors) == index
    assert set(launches) == {'nonfinite_kernel'}


class InterruptedAt:
    """An exchange that is interrupted before its call of that number."""

    def __init__(self, exchange: Callable[..., None], call: int) -> None:
        self.exchange = exchange
        self.call = call
        self.calls = 0

    def __call__(self, left: Any, right: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        self.exchange(left, right)


@pytest.mark.usefixtures('at_once')
@pytest.mark.parametrize('call', [1, 2])
def test_an_interrupted_swap_out_can_be_finished(make_mlp, monkeypatch, launches, call):
    """The floats of the model come back in one launch, its integers in another; each is noted."""
    model = make_mlp().to(DEVICE)
    state = AverageState(rules.bema_rule(), nonfinite='ignore')
    state.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    state.update(model, 1)
    training = {n: bits(t) for n, t in model.state_dict().items()}
    average = {n: bits(t) for n, t in state.average().items()}
    launches.clear()
    state.swap_in(model)
    assert launches == ['exchange_kernel'] * 2
    monkeypatch.setattr(kernels, 'exchange', InterruptedAt(kernels.exchange, call))
    with pytest.raises(KeyboardInterrupt):
        state.swap_out()
    assert state.swapped
    assert {n: bits(t) for n, t in state.average().items()} == average
    state.swap_out()
    assert {n: bits(t) for n, t in model.state_dict().items()} == training
    assert {n: bits(t) for n, t in state.average().items()} == average
