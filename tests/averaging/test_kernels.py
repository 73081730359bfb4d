# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The kernels agree with a slow and obvious float64 reference, whatever the tensors look like in memory."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from composer_bema.averaging import chunks, kernels, threads
from composer_bema.averaging.rules import Difference, Lerp, LinearStep
from tests.averaging.reference import apply_rows

CHUNK = 64
BEMA_STEP = LinearStep((Lerp('ema', 'theta', 0.25), Difference('bema', 'ema', 0.5, 'theta', 'theta_0')), {})
SHAPE = (6, 4, 5, 3)
LAYOUTS = ('contiguous', 'reversed axes', 'channels last', 'offset', 'gaps')


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch, by_torch_alone: None) -> None:
    """Makes tensors of a few hundred elements span several chunks."""
    monkeypatch.setattr(chunks, '_CPU_CHUNK', CHUNK)


@pytest.fixture(params=['one chunk', 'small chunks', 'compiled'])
def any_chunks(request: pytest.FixtureRequest) -> None:
    """Runs a test with all that host memory may be walked by."""
    if request.param == 'compiled':
        if kernels._compiled() is None:
            pytest.skip('the compiled kernels were not compiled')
    else:
        request.getfixturevalue('small_chunks' if request.param == 'small chunks' else 'by_torch_alone')


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()


def reference(step: LinearStep, theta: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The rows in float64, one whole array at a time."""
    values = {'theta': to_numpy(theta), **{name: to_numpy(tensor) for name, tensor in buffers.items()}}
    apply_rows(step, values)
    return values


def apply_to_one(step: LinearStep, theta: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
    kernels.apply_step(step, [theta], {name: [tensor] for name, tensor in buffers.items()})


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, otherwise in memory."""
    if layout == 'contiguous':
        return values.clone(memory_format=torch.contiguous_format)
    if layout == 'reversed axes':
        axes = range(values.ndim - 1, -1, -1)
        return values.permute(*axes).contiguous().permute(*axes)
    if layout == 'channels last':
        return values.clone(memory_format=torch.channels_last)
    if layout == 'offset':
        return torch.full((values.numel() + 7,), 99.0, dtype=values.dtype)[7:].view(values.shape).copy_(values)
    memory = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 99.0, dtype=values.dtype)
    return memory[..., ::2].copy_(values)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make_buffers(shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, dtype=dtype) for name in ('theta_0', 'ema', 'bema')}


@pytest.mark.parametrize(
    ('theta_dtype', 'theta_0_dtype', 'buffer_dtype', 'tolerance'),
    [
        (torch.float32, torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, torch.float32, 1e-6),
        (torch.float16, torch.float16, torch.float32, 1e-6),
        (torch.float64, torch.float64, torch.float64, 1e-15),
        (torch.float64, torch.bfloat16, torch.float64, 1e-15),
        (torch.complex64, torch.complex64, torch.complex64, 1e-6),
    ],
)
@pytest.mark.usefixtures('any_chunks')
def test_a_step_agrees_with_the_reference_in_every_dtype(theta_dtype, theta_0_dtype, buffer_dtype, tolerance):
    """Weights of any dtype are widened chunk by chunk; buffers keep theirs, and what is only read is unchanged."""
    theta = torch.randn(SHAPE, dtype=theta_dtype)
    buffers = make_buffers(dtype=buffer_dtype)
    buffers['theta_0'] = buffers['theta_0'].to(theta_0_dtype)
    expected = reference(BEMA_STEP, theta, buffers)
    before = bits(theta), bits(buffers['theta_0'])
    apply_to_one(BEMA_STEP, theta, buffers)
    for name in ('ema', 'bema'):
        assert buffers[name].dtype == buffer_dtype
        np.testing.assert_allclose(to_numpy(buffers[name]), expected[name], rtol=0, atol=4 * tolerance)
    assert (bits(theta), bits(buffers['theta_0'])) == before


@pytest.mark.usefixtures('small_chunks')
@pytest.mark.parametrize('numel', [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_every_element_is_updated_once_at_the_chunks_edges(numel):
    theta, buffers = torch.randn(numel), make_buffers((numel,))
    expected = reference(BEMA_STEP, theta, buffers)
    apply_to_one(BEMA_STEP, theta, buffers)
    for name in ('ema', 'bema'):
        np.testing.assert_allclose(buffers[name].numpy(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.usefixtures('any_chunks')
@pytest.mark.parametrize('buffer_layout', LAYOUTS)
@pytest.mark.parametrize('theta_layout', [*LAYOUTS, 'expanded'])
def test_a_step_pairs_elements_by_index_in_any_layout(theta_layout, buffer_layout):
    """The weights and the buffers may lie otherwise in memory, and theta_0 otherwise again."""
    if theta_layout == 'expanded':
        theta = torch.randn(SHAPE[1:]).expand(SHAPE)
    else:
        theta = lay_out(torch.randn(SHAPE), theta_layout)
    buffers = {name: lay_out(tensor, buffer_layout) for name, tensor in make_buffers().items()}
    buffers['theta_0'] = buffers['theta_0'].contiguous()
    expected = reference(BEMA_STEP, theta, buffers)
    apply_to_one(BEMA_STEP, theta, buffers)
    for name in ('ema', 'bema'):
        np.testing.assert_allclose(buffers[name].numpy(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.usefixtures('any_chunks')
@pytest.mark.parametrize('layout', ['offset', 'gaps'])
def test_a_step_leaves_the_memory_between_the_elements_alone(layout):
    """A shard is a slice of a larger piece of memory, whose other elements belong to someone else."""
    buffers = {name: lay_out(tensor, layout) for name, tensor in make_buffers().items()}
    apply_to_one(BEMA_STEP, torch.randn(SHAPE), buffers)
    for tensor in buffers.values():
        memory = tensor._base
        assert memory is not None
        others = memory[:7] if layout == 'offset' else memory[..., 1::2]
        assert torch.equal(others, torch.full_like(others, 99.0))


@pytest.mark.usefixtures('small_chunks')
def test_many_tensors_of_unlike_sizes_share_a_pass():
    """The scratch memory grows and is handed out again; a 0-d and an empty tensor are tensors too."""
    shapes = [(), (0,), (3, 0, 2), (5,), (CHUNK,), (3, CHUNK), (2,), (7, 31)]
    theta = [torch.randn(shape).bfloat16() for shape in shapes]
    buffers = [make_buffers(shape) for shape in shapes]
    expected = [reference(BEMA_STEP, *pair) for pair in zip(theta, buffers, strict=True)]
    kernels.apply_step(BEMA_STEP, theta, {name: [b[name] for b in buffers] for name in ('theta_0', 'ema', 'bema')})
    for kept, wanted in zip(buffers, expected, strict=True):
        for name in ('ema', 'bema'):
            assert kept[name].shape == wanted[name].shape
            np.testing.assert_allclose(kept[name].numpy(), wanted[name], rtol=0, atol=1e-6)


def test_rows_see_the_rows_before_them():
    """The bema row uses the ema of this update, not of the last: 0 + 1/4 (8 - 0) = 2, and 2 + 1/2 (8 - 0) = 6."""
    buffers = {name: torch.zeros(3) for name in ('theta_0', 'ema', 'bema')}
    apply_to_one(BEMA_STEP, torch.full((3,), 8.0), buffers)
    assert (buffers['ema'] == 2).all() and (buffers['bema'] == 6).all()


def test_a_buffer_may_have_any_name():
    """Scratch memory goes by the names of the buffers that are widened, and may not be handed out for another use."""
    for name in ('difference', 'left', 'exchange'):
        step = LinearStep((Difference('bema', name, 0.5, 'theta', 'theta_0'),), {})
        buffers = {
            'bema': torch.zeros(4),
            'theta_0': torch.full((4,), 2.0),
            name: torch.full((4,), 3.0, dtype=torch.bfloat16),
        }
        apply_to_one(step, torch.full((4,), 6.0), buffers)
        assert buffers['bema'].tolist() == [5.0] * 4


@pytest.mark.usefixtures('any_chunks')
@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32])
def test_a_weight_of_one_copies_what_cannot_be_averaged(dtype):
    theta = torch.randint(0, 100, SHAPE).to(dtype)
    buffers = {'latest': torch.zeros(SHAPE, dtype=dtype)}
    apply_to_one(LinearStep((Lerp('latest', 'theta', 1.0),), {}), theta, buffers)
    assert bits(buffers['latest']) == bits(theta)


def test_large_integers_are_copied_exactly():
    """A count above 2^53 would be rounded by any floating-point detour."""
    theta = torch.tensor(2**53 + 1)
    buffers = {'latest': torch.tensor(0)}
    apply_to_one(LinearStep((Lerp('latest', 'theta', 1.0),), {}), theta, buffers)
    assert buffers['latest'].item() == 2**53 + 1


def test_lists_of_unlike_length_are_an_error():
    with pytest.raises(ValueError, match='zip'):
        kernels.apply_step(BEMA_STEP, [torch.zeros(2)] * 2, {n: [torch.zeros(2)] for n in ('theta_0', 'ema', 'bema')})


def special_values(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """Random bit patterns: NaNs with payloads, infinities, subnormals, and both zeros."""
    size = torch.empty(0, dtype=dtype).element_size()
    values = torch.randint(0, 256, (numel * size,), dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        values[:4] = torch.tensor([-0.0, 0.0, math.inf, -math.inf], dtype=dtype)
        if dtype == torch.float32:
            values[4:6] = torch.tensor([0x7F800001, -0x3FFFFE], dtype=torch.int32).view(dtype)
    return values


@pytest.mark.usefixtures('any_chunks')
@pytest.mark.parametrize('layouts', [('contiguous', 'contiguous'), ('gaps', 'channels last'), ('offset', 'gaps')])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64]
)
def test_an_exchange_is_bit_exact(dtype, layouts):
    """Payloads of NaNs and the sign of zero included: a swap may not change the weights that it puts aside."""
    numel = math.prod(SHAPE)
    left, right = (lay_out(special_values(dtype, numel).view(SHAPE), layout) for layout in layouts)
    was_left, was_right = bits(left), bits(right)
    assert was_left != was_right
    kernels.exchange([left], [right])
    assert (bits(left), bits(right)) == (was_right, was_left)
    kernels.exchange([left], [right])
    assert (bits(left), bits(right)) == (was_left, was_right)


@pytest.mark.usefixtures('any_chunks')
def test_an_exchange_takes_scalars_and_empty_tensors():
    left, right = [torch.tensor(1.0), torch.empty(0)], [torch.tensor(2.0), torch.empty(0)]
    kernels.exchange(left, right)
    assert (left[0].item(), right[0].item()) == (2.0, 1.0)


@pytest.mark.usefixtures('small_chunks')
@pytest.mark.parametrize('failing', [1, 2, 3, 4, 5, 6])
def test_an_exchange_that_finds_no_memory_has_done_nothing(monkeypatch, failing):
    """Each of two threads, and who would have to undo it, has room for a chunk of either dtype before one begins."""
    left = [torch.ones(3), torch.ones(4 * CHUNK), torch.ones(4 * CHUNK, dtype=torch.float64)]
    right = [torch.zeros_like(tensor) for tensor in left]
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(chunks, '_CHUNKS_A_THREAD', 1)
    allocated = []

    def allocate(size, **kwargs):
        allocated.append(size)
        if len(allocated) == failing:
            raise MemoryError
        return torch.zeros(size, **kwargs)

    monkeypatch.setattr(torch, 'empty', allocate)
    with pytest.raises(MemoryError):
        kernels.exchange(left, right)
    assert all((tensor == 1).all() for tensor in left)
    assert all((tensor == 0).all() for tensor in right)
    kernels.exchange(left, right)
    assert allocated == [CHUNK] * (failing + 6)
    assert all((tensor == 0).all() for tensor in left)


@pytest.mark.usefixtures('small_chunks')
@pytest.mark.parametrize('bad', [0, 1, 2])
def test_an_exchange_that_fails_on_the_way_has_done_nothing(bad):
    """Two values of one piece of memory cannot be written to; what was exchanged before them is put back."""
    for side in (0, 1):
        pairs = [[torch.ones(3 * CHUNK + 5), torch.zeros(3 * CHUNK + 5)] for _ in range(3)]
        pairs[bad][side] = torch.full((1,), 7.0).expand(3 * CHUNK + 5)
        before = [[tensor.clone() for tensor in pair] for pair in pairs]
        with pytest.raises(RuntimeError, match='more than one element'):
            kernels.exchange(*zip(*pairs, strict=True))
        assert all(map(torch.equal, itertools.chain(*pairs), itertools.chain(*before)))


@pytest.mark.usefixtures('any_chunks')
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_one_bad_value_anywhere_is_found(dtype, bad):
    tensors = [torch.randn(3, 70).to(dtype) for _ in range(4)]
    assert kernels.first_nonfinite(tensors) is None
    tensors[3][0, 0] = bad
    assert kernels.first_nonfinite(tensors) == 3
    tensors[1][2, 69] = bad
    assert kernels.first_nonfinite(tensors) == 1


@pytest.mark.usefixtures('small_chunks')
def test_a_bad_value_is_found_in_any_chunk():
    tensors = [torch.zeros(shape) for shape in (3 * CHUNK + 5, 0, 1, 2 * CHUNK)]
    tensors[3][-1] = math.nan
    assert kernels.first_nonfinite(tensors) == 3
    tensors[0][2 * CHUNK] = math.inf
    assert kernels.first_nonfinite(tensors) == 0


def test_infinities_of_both_signs_do_not_cancel():
    assert kernels.first_nonfinite([torch.tensor([math.inf, -math.inf])]) == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_finite_values_whose_sum_overflows_are_finite(dtype):
    largest = torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype)
    assert kernels.first_nonfinite([torch.zeros(2), largest]) is None
    bad = largest.clone()
    bad[-1] = math.nan
    # The bad one comes after one that only looks bad.
    assert kernels.first_nonfinite([largest, bad]) == 1


def test_finite_complex_values_of_double_precision_are_finite():
    assert kernels.first_nonfinite([torch.tensor([complex(1.6e308, 1.6e308)], dtype=torch.complex128)]) is None


def test_the_first_bad_tensor_is_named_across_dtypes():
    """Sums are fetched dtype by dtype, which may not change whose they are."""
    tensors = [torch.ones(2, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float64, torch.bfloat16)]
    for index in (3, 2, 1):
        tensors[index][1] = math.nan
        assert kernels.first_nonfinite(tensors) == index


def test_nothing_and_emptiness_are_finite():
    assert kernels.first_nonfinite([]) is None
    assert kernels.first_nonfinite([torch.empty(0), torch.tensor(1.0), torch.empty(3, 0)]) is None


@pytest.mark.usefixtures('any_chunks')
@pytest.mark.parametrize('layouts', [('contiguous', 'contiguous'), ('gaps', 'channels last')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.complex64])
def test_the_distance_is_euclidean(dtype, layouts):
    """Taken in the dtype of the second, wider list."""
    wide = torch.promote_types(dtype, torch.float32)
    left = [lay_out(torch.randn(SHAPE).to(dtype), layouts[0]), torch.randn((), dtype=dtype)]
    right = [lay_out(torch.randn(SHAPE).to(wide), layouts[1]), torch.randn((), dtype=wide)]
    squares = sum((np.abs(to_numpy(a) - to_numpy(b)) ** 2).sum().item() for a, b in zip(left, right, strict=True))
    assert kernels.distance(left, right) == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_a_distance_by_hand():
    assert kernels.distance([torch.zeros(2), torch.tensor(12.0)], [torch.tensor([3.0, 4.0]), torch.tensor(0.0)]) == 13
    assert kernels.distance([], []) == 0
    assert kernels.distance([torch.empty(0)], [torch.empty(0)]) == 0


@pytest.mark.usefixtures('any_chunks')
def test_exactness_is_judged_by_every_value():
    values = torch.randn(3, 90).bfloat16().float()
    values[0, :5] = torch.tensor([-0.0, math.inf, -math.inf, 2.0**-130, 3.0e38]).bfloat16().float()
    assert kernels.is_exact_in(values, torch.bfloat16)
    assert kernels.is_exact_in(lay_out(values, 'gaps'), torch.bfloat16)
    assert kernels.is_exact_in(torch.empty(0), torch.bfloat16)
    assert kernels.is_exact_in(torch.tensor(0.5), torch.bfloat16)
    # bfloat16 has 8 significant bits.
    values[2, 89] = 1 + 2**-8
    assert not kernels.is_exact_in(values, torch.bfloat16)


def test_a_nan_is_not_exact():
    """Its payload would be lost."""
    assert not kernels.is_exact_in(torch.tensor([1.0, math.nan]), torch.bfloat16)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps all work on this thread, the only one that a dispatch mode sees."""
    monkeypatch.setattr(threads, '_MOST_THREADS', 1)


class LargestAllocation(TorchDispatchMode):
    """Watches for the largest tensor that an operation returns in memory of its own."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors_in((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result


def _tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors_in(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            yield from _tensors_in(leaf)


PASSES = {
    'apply_step': lambda theta, ema, bema: apply_to_one(BEMA_STEP, theta, {'theta_0': theta, 'ema': ema, 'bema': bema}),
    'exchange': lambda theta, ema, bema: kernels.exchange([ema], [bema]),
    'distance': lambda theta, ema, bema: kernels.distance([theta], [ema]),
    'is_exact_in': lambda theta, ema, bema: kernels.is_exact_in(ema, torch.bfloat16),
    'first_nonfinite': lambda theta, ema, bema: kernels.first_nonfinite([theta, ema]),
}


def largest_temporary(name: str, shape: Sequence[int], layout: str) -> int:
    """Elements of the largest temporary of a pass over 16-bit weights and 32-bit buffers."""
    theta = lay_out(torch.randn(shape).bfloat16(), layout)
    ema, bema = lay_out(torch.zeros(shape), layout), torch.zeros(shape)
    with LargestAllocation() as watch:
        PASSES[name](theta, ema, bema)
    return watch.numel


@pytest.mark.usefixtures('small_chunks', 'one_thread')
@pytest.mark.parametrize('layout', ['contiguous', 'gaps'])
@pytest.mark.parametrize('name', PASSES)
def test_no_temporary_is_larger_than_a_chunk(name, layout):
    """Widening a whole tensor at once would cost a second copy of the largest weight of the model."""
    assert largest_temporary(name, (20, 50), layout) <= CHUNK


@pytest.mark.usefixtures('small_chunks', 'one_thread')
@pytest.mark.parametrize('shape', [(1, 1000), (2, 10, 50), (1, 1, 3, 100), (5, 100)])
@pytest.mark.parametrize('name', PASSES)
def test_no_temporary_is_larger_than_a_chunk_however_few_slices_there_are(name, shape):
    assert largest_temporary(name, shape, 'gaps') <= CHUNK


@pytest.mark.usefixtures('small_chunks')
@pytest.mark.parametrize('layout', ['contiguous', 'gaps'])
def test_a_suspect_is_looked_at_chunk_by_chunk(layout):
    """Its sum overflows, so that every value has to be looked at; the last of them is bad."""
    suspect = lay_out(torch.full((20, 50), torch.finfo(torch.float32).max), layout)
    with LargestAllocation() as watch:
        assert kernels.first_nonfinite([suspect]) is None
        suspect[19, 49] = math.nan
        assert kernels.first_nonfinite([suspect]) == 0
    assert 0 < watch.numel <= CHUNK


@pytest.mark.usefixtures('small_chunks')
@pytest.mark.parametrize('shape', [(1, 1000), (2, 10, 50), (1, 1, 3, 100), (5, 100)])
def test_slices_that_are_cut_further_are_all_updated(shape):
    theta, buffers = lay_out(torch.randn(shape), 'gaps'), make_buffers(shape)
    expected = reference(BEMA_STEP, theta, buffers)
    apply_to_one(BEMA_STEP, theta, buffers)
    for name in ('ema', 'bema'):
        np.testing.assert_allclose(buffers[name].numpy(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize('theta_dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('home', ['cpu', 'cuda'])
def test_a_step_reaches_across_devices(monkeypatch, home, theta_dtype):
    """Weights on the accelerator, buffers beside them or in host memory."""
    monkeypatch.setattr(chunks, '_ACCELERATOR_CHUNK', CHUNK)
    theta, buffers = torch.randn(SHAPE).to(theta_dtype), make_buffers()
    expected = reference(BEMA_STEP, theta, buffers)
    buffers = {name: tensor.to(home) for name, tensor in buffers.items()}
    apply_to_one(BEMA_STEP, theta.cuda(), buffers)
    for name in ('ema', 'bema'):
        np.testing.assert_allclose(to_numpy(buffers[name].cpu()), expected[name], rtol=0, atol=1e-6)
    assert kernels.first_nonfinite([theta.cuda(), torch.tensor([math.nan])]) == 1
