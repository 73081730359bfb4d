# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages piece by piece: what plain float64 arithmetic gives, copies to the bit, and errors that end all threads."""

import contextlib
import threading
from unittest import mock

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_bema.averaging.coefficients import fold
from composer_bema.averaging.rules import bema_rule, dema_rule, ema_rule
from composer_bema.averaging.windows import Window
from composer_bema.formats.tensors import LazyTensor, piece_memory
from composer_bema.offline import streaming
from composer_bema.offline.outputs import MemoryWriter
from composer_bema.offline.streaming import Job, scratch_bytes, stream_averages

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# How many averages go without matrices: all of them, or none.
STRATEGIES = {'interpolations': 99, 'product': 0}


@contextlib.contextmanager
def pieces_of(size, few=streaming._FEW):
    """Pieces of a few elements, so that tiny tensors have several."""
    with mock.patch.multiple(streaming, _LARGEST_PIECE=size, _SMALLEST_PIECE=size, _FEW=few):
        yield


def lazy(tensor):
    """A tensor that is read into the memory of whoever asks, as those in files are."""
    flat = tensor.reshape(-1)

    def stream(size, memory):
        values = piece_memory(min(size, flat.numel()), tensor.dtype, memory)
        for start in range(0, max(flat.numel(), 1), size):
            piece = values[: flat.numel() - start]
            piece.copy_(flat[start : start + size])
            yield piece

    return LazyTensor(tensor.shape, tensor.dtype, lambda: tensor, stream)


def job_of(name, tensors, coefficients, copied=False):
    paths = [f'step{index}' for index in range(len(tensors))]
    return Job(name, [lazy(tensor) for tensor in tensors], paths, np.asarray(coefficients, dtype=np.float64), copied)


def averages_of(tensors, coefficients, threads=1, dtype=torch.float64, copied=False):
    """The averages of one tensor, in a wide enough dtype to see all of their bits."""
    sinks = [MemoryWriter({'x': LazyTensor.of(tensors[0]).spec._replace(dtype=dtype)}) for _ in coefficients]
    stream_averages([job_of('x', tensors, coefficients, copied)], sinks, threads)
    return [sink.weights['x'] for sink in sinks]


class Discard:
    """A sink that keeps nothing."""

    def write(self, name, start, values):
        pass


@st.composite
def coefficient_rows(draw, checkpoints, averages):
    """Rows that sum to 1, of which what is newer than any checkpoint weighs positively, as in every average."""
    rows = np.zeros((averages, checkpoints))
    for row in rows:
        newest = draw(st.integers(0, checkpoints - 1))
        row[newest] = 1
        for index in reversed(range(newest)):
            weight = draw(st.sampled_from([0, 0.5, 0.25]) | st.floats(-1, 0.9))
            row *= 1 - weight
            row[index] = weight
    return rows


@st.composite
def trajectories(draw):
    checkpoints, averages = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shape = draw(st.sampled_from([(), (0,), (0, 3), (1,), (7,), (8,), (9,), (3, 5), (2, 2, 9)]))
    dtypes = draw(st.lists(st.sampled_from(FLOATS), min_size=checkpoints, max_size=checkpoints))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensors = [(torch.rand(shape, generator=generator) * 2 - 1).to(dtype) for dtype in dtypes]
    return tensors, draw(coefficient_rows(checkpoints, averages))


# The numbers


@pytest.mark.parametrize('strategy', STRATEGIES)
@given(trajectory=trajectories(), size=st.sampled_from([1, 8, 64]), threads=st.sampled_from([1, 3]))
@settings(max_examples=60)
def test_averages_are_those_of_plain_arithmetic(strategy, trajectory, size, threads):
    """Of any shape and dtype, in pieces of any size, with coefficients that may be negative."""
    tensors, coefficients = trajectory
    expected = np.tensordot(coefficients, np.stack([tensor.double().numpy() for tensor in tensors]), 1)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    with pieces_of(size, STRATEGIES[strategy]):
        found = averages_of(tensors, coefficients, threads)
    atol = (1e-14 if wide else 1e-6) * max(1, np.abs(coefficients).sum(axis=1).max())
    np.testing.assert_allclose(np.stack([values.numpy() for values in found]), expected, rtol=0, atol=atol)


@pytest.mark.parametrize('rule', [bema_rule(lag=1), dema_rule(lag=1), ema_rule(smoothing=0.9)])
@pytest.mark.parametrize('count', [2, 3])
def test_two_averages_and_three_are_computed_in_two_ways_and_alike(rule, count):
    """Of two the steps are done one by one, and from three on there is a matrix."""
    rows = fold(rule, 0, range(1, 7))[-count:]
    tensors = [torch.randn(1000) for _ in range(7)]
    expected = np.tensordot(rows, np.stack([tensor.double().numpy() for tensor in tensors]), 1)
    found = averages_of(tensors, rows)
    np.testing.assert_allclose(torch.stack(found).numpy(), expected, rtol=0, atol=1e-5)


def growing(dtype=torch.float32, count=30):
    """Weights that start from zero and grow without bounds."""
    return [(torch.rand(1000) * 2 - 1).mul(1e-3 * (1.8**step - 1)).to(dtype) for step in range(count)]


def relative_errors(found, rows, tensors):
    expected = np.tensordot(rows, np.stack([tensor.double().numpy() for tensor in tensors]), 1)
    return [
        np.linalg.norm(values.double().numpy() - row) / np.linalg.norm(row)
        for values, row in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('rule', [ema_rule(), ema_rule(smoothing=0.9), bema_rule(), dema_rule(), Window(4)])
def test_an_average_is_as_exact_as_its_own_checkpoints_allow(strategy, rule):
    """Whatever the weights of newer ones are: of the last one here they are eight powers of ten larger."""
    tensors = growing()
    steps = range(1, len(tensors))
    rows = fold(rule, 0, steps)
    with pieces_of(64, STRATEGIES[strategy]):
        found = averages_of(tensors, rows)
    assert max(relative_errors(found, rows, tensors)) < 1e-6


@pytest.mark.parametrize('rule', [ema_rule(), Window(2)])
def test_an_average_does_not_depend_on_those_that_are_asked_for_with_it(rule):
    tensors = growing()
    rows = fold(rule, 0, range(1, len(tensors)))
    together = averages_of(tensors, rows)
    for index in (1, 9, len(rows) - 1):
        (alone,) = averages_of(tensors, rows[index : index + 1])
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-6 * alone.abs().max().item())


@given(rows=coefficient_rows(5, 4), powers=st.lists(st.integers(-30, 30), min_size=5, max_size=5))
def test_others_do_not_round_an_average_however_large_their_checkpoints_are(rows, powers):
    """Before, between and after its own."""
    tensors = [10.0**power * torch.randn(20, generator=torch.Generator().manual_seed(3)) for power in powers]
    with pieces_of(8, few=0):
        together = averages_of(tensors, rows)
        for row, found in zip(rows, together, strict=True):
            own = [tensors[index] for index in np.flatnonzero(row)]
            [alone] = averages_of(own, [row[row != 0]])
            largest = max(tensor.abs().max().item() for tensor in own)
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-6 * largest)


def test_what_weighs_nothing_in_an_average_does_not_round_it():
    """By hand: of 1 and 3, while a checkpoint between them and one after them are beyond all bounds."""
    tensors = [torch.full((20,), value) for value in (1.0, 1e30, 3.0, 1e35)]
    rows = [[0.5, 0, 0.5, 0], [0.25, 0, 0.75, 0], [0.25, 0.25, 0.5, 0], [0, 0, 0.5, 0.5]]
    found = [values.unique().item() for values in averages_of(tensors, rows)]
    assert found[:2] == [2, 2.5] and found[2:] == pytest.approx([2.5e29, 5e34], rel=1e-6)


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('dtype', FLOATS)
def test_what_training_left_alone_comes_out_as_it_went_in(strategy, dtype):
    """To the bit, though coefficients such as 1.7, -0.9 and 0.2 make a sum that is not quite 1."""
    tensor = torch.randn(1000).to(dtype)
    rows = fold(bema_rule(lag=1), 0, range(1, 6))
    with pieces_of(64, STRATEGIES[strategy]):
        for found in averages_of([tensor] * 6, rows, dtype=dtype):
            assert torch.equal(found, tensor)


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64])
def test_copies_are_exact_to_the_bit(strategy, dtype):
    """An average with a single coefficient is no arithmetic: large integers, -0.0 and the bits of a NaN survive it."""
    tensors = [torch.randint(0, 256, (40 * dtype.itemsize,), dtype=torch.uint8) for _ in range(3)]
    tensors = [(bits % 2 if dtype == torch.bool else bits).view(dtype) for bits in tensors]
    with pieces_of(16, STRATEGIES[strategy]):
        found = averages_of(tensors, np.eye(3)[[0, 2, 1]], dtype=dtype, copied=True)
    for values, index in zip(found, (0, 2, 1), strict=True):
        assert torch.equal(values.view(torch.uint8), tensors[index].view(torch.uint8))


def test_copies_and_averages_of_one_tensor():
    """An average that is a checkpoint, among others that are not."""
    tensors = [torch.full((20,), value) for value in (1.0, 2.0, 4.0)]
    rows = [[0, 1, 0], [0.5, 0.5, 0], [0, 0, 1], [-1, 0, 2]]
    with pieces_of(8):
        found = averages_of(tensors, rows)
    assert [values.unique().tolist() for values in found] == [[2.0], [1.5], [4.0], [7.0]]


# Digests


def test_digests_are_of_the_bytes():
    """However these are cut into pieces, and whichever thread reads them."""
    tensors = {
        'a': [torch.randn(3, 7), torch.randn(3, 7).bfloat16()],
        'b': [torch.tensor(2.5), torch.tensor(3.5)],
        'c': [torch.arange(50), torch.arange(50) + 1],
        'd': [torch.empty(0, 2), torch.empty(0, 2)],
    }
    expected = {
        (index, name): xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, pair in tensors.items()
        for index, tensor in enumerate(pair)
    }
    rows = {name: [[0.5, 0.5]] if name in 'ab' else [[0, 1]] for name in tensors}
    jobs = [job_of(name, pair, rows[name]) for name, pair in tensors.items()]
    for size in (4, 16, 1024):
        for threads in (1, 4):
            with pieces_of(size):
                assert stream_averages(jobs, [Discard()], threads) == expected
    assert len(set(expected.values())) == 7


@pytest.mark.parametrize('bit', [0, 37, 319])
def test_a_flipped_bit_changes_the_digest_of_its_checkpoint_alone(bit):
    tensors = [torch.ones(10), torch.ones(10)]
    flipped = tensors[0].clone()
    flipped.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    # The average is the other checkpoint, so that a NaN would not matter.
    found = [
        stream_averages([job_of('x', pair, [[0, 1]])], [Discard()], 1) for pair in (tensors, [flipped, tensors[1]])
    ]
    assert found[0][0, 'x'] != found[1][0, 'x']
    assert found[0][1, 'x'] == found[1][1, 'x'] == found[0][0, 'x']


# What is no number


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('place', [0, 41])
def test_a_value_that_is_not_finite_is_traced_to_its_checkpoint(strategy, bad, place):
    tensors = [torch.ones(42) for _ in range(3)]
    tensors[1][place] = bad
    message = (
        r"^The tensor 'x' in 'step1' holds a NaN or an infinity: leave that checkpoint out, or .*\(--copy 'x'\)\.$"
    )
    with pieces_of(8, STRATEGIES[strategy]), pytest.raises(ValueError, match=message):
        averages_of(tensors, [[0.25, 0.25, 0.5]])


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('bad', [float('nan'), -float('inf')])
def test_an_average_of_one_checkpoint_may_not_hold_them_either(strategy, bad):
    """As that of a window of one is: it is no copy that was asked for."""
    tensors = [torch.zeros(9), torch.zeros(9), torch.zeros(9)]
    tensors[1][5] = bad
    with (
        pieces_of(4, STRATEGIES[strategy]),
        pytest.raises(ValueError, match="'x' in 'step1' holds a NaN or an infinity"),
    ):
        averages_of(tensors, np.eye(3)[[2, 1]])


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('dtype', [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize('row', [[0, 1], [0.5, 0.5]])
def test_tensors_of_all_dtypes_are_checked(strategy, dtype, row):
    """Also of those that torch can neither add up nor ask whether they are finite."""
    tensors = [torch.ones(42).to(dtype) for _ in range(2)]
    with pieces_of(8, STRATEGIES[strategy]):
        [found] = averages_of(tensors, [row])
        assert (found == 1).all()
        tensors[1][41] = float('nan')
        with pytest.raises(ValueError, match=r"^The tensor 'x' in 'step1' holds a NaN or an infinity"):
            averages_of(tensors, [row])


def test_large_numbers_that_are_an_average_are_finite():
    """Though their sum is not."""
    [found] = averages_of([torch.full((40,), 6e4).half()], [[1]])
    assert (found == 6e4).all()


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('place', range(4))
def test_a_checkpoint_that_weighs_in_no_average_may_hold_anything(strategy, place):
    tensors = [torch.ones(20) for _ in range(4)]
    tensors[place] = torch.full((20,), float('nan'))
    rows = np.insert([[0.5, 0.5, 0], [0.25, 0.25, 0.5], [0, 0, 1]], place, 0, axis=1)
    with pieces_of(8, STRATEGIES[strategy]):
        assert all((values == 1).all() for values in averages_of(tensors, rows))


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_an_infinity_that_is_copied_is_none_of_our_business(strategy):
    tensors = [torch.full((9,), -float('inf')), torch.full((9,), float('nan'))]
    with pieces_of(4, STRATEGIES[strategy]):
        first, second = averages_of(tensors, np.eye(2), copied=True)
    assert (first == -float('inf')).all() and second.isnan().all()


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_an_average_that_overflows_is_told_from_a_value_that_was_infinite(strategy):
    tensors = [torch.full((4,), -3e38), torch.full((4,), 3e38)]
    with (
        pieces_of(4, STRATEGIES[strategy]),
        pytest.raises(ValueError, match=r"^The average of the tensor 'x' overflows\.$"),
    ):
        averages_of(tensors, [[-1, 2]])


def test_a_sum_that_overflows_is_no_average_that_does():
    """The values are checked by their sum first."""
    [found] = averages_of([torch.full((40,), 3e38)] * 2, [[0.5, 0.5]])
    assert torch.equal(found.float(), torch.full((40,), 3e38))


# Threads


def error_of(call):
    """Returns the error that a call raises; one that hangs fails the test and not the session."""
    errors = []

    def run():
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), 'it hangs'
    [error] = errors
    return error


class Interrupt(BaseException):
    """What no `except Exception` catches, as a `KeyboardInterrupt`."""


class FailingSink:
    """Fails at one of the tensors."""

    def __init__(self, name, error):
        self.name = name
        self.error = error

    def write(self, name, start, values):
        if name == self.name:
            raise self.error


@pytest.mark.parametrize('error', [OSError('No space left'), Interrupt(), KeyboardInterrupt()])
@pytest.mark.parametrize('where', ['sink', 'reader', 'on_read'])
@pytest.mark.parametrize('threads', [1, 3])
def test_an_error_in_one_thread_is_raised_and_ends_the_others(error, where, threads):
    """The very error; the others do not read to their end, which would take them a while."""
    threads_before, failed, read = torch.get_num_threads(), threading.Event(), []

    def endless(size, memory):
        while True:
            # The other thread gets the time to fail.
            failed.wait(30)
            read.append(size)
            yield torch.ones(size)

    def fail(count):
        failed.set()
        if where == 'on_read':
            raise error

    def broken(size, memory):
        failed.set()
        if where == 'reader':
            raise error
        yield torch.ones(size)

    streams = {'broken': (8, broken), 'long': (10**9, endless)}
    jobs = [
        Job(name, [LazyTensor(torch.Size([numel]), torch.float32, torch.Tensor, stream)], ['step0'], np.ones((1, 1)))
        for name, (numel, stream) in streams.items()
        if name == 'broken' or threads > 1
    ]
    sink = FailingSink('broken', error) if where == 'sink' else Discard()
    with pieces_of(8):
        found = error_of(lambda: stream_averages(jobs, [sink], threads, fail))
    assert found is error
    assert len(read) < 10**6
    assert torch.get_num_threads() == threads_before


def test_the_threads_share_the_tensors_and_all_are_done():
    jobs = [
        job_of(str(index), [torch.full((index,), 1.0), torch.full((index,), 3.0)], [[0.5, 0.5]]) for index in range(30)
    ]
    sink = MemoryWriter({job.name: job.tensors[0].spec for job in jobs})
    with pieces_of(8):
        digests = stream_averages(jobs, [sink], 4)
    assert all((values == 2).all() for values in sink.weights.values())
    assert set(digests) == {(index, job.name) for job in jobs for index in (0, 1)}


@pytest.mark.parametrize('threads', [1, 4])
def test_what_has_been_read_adds_up(threads):
    jobs = [job_of(str(n), [torch.ones(n), torch.ones(n).bfloat16()], [[0.5, 0.5]]) for n in (0, 1, 8, 100)]
    counts = []
    with pieces_of(8):
        stream_averages(jobs, [Discard()], threads, counts.append)
    # Four bytes and two for each of 109 elements, of which no more than 8 are read at a time.
    assert (sum(counts), max(counts)) == (109 * 6, 48)
    assert sum(job.nbytes for job in jobs) == 109 * 6


def test_the_number_of_threads_of_torch_is_what_it_was():
    """For this thread and for those that are made later."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        averages_of([torch.ones(4)] * 2, [[0.5, 0.5]], threads=3)
        seen = [torch.get_num_threads()]
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2, 2]
    finally:
        torch.set_num_threads(before)


# Memory


@pytest.mark.parametrize('averages', [1, 4])
def test_no_piece_is_larger_than_it_may_be(averages):
    asked, written = set(), set()

    class Sink:
        def write(self, name, start, values):
            written.add(values.numel())

    def watched(tensor):
        inner = lazy(tensor)

        def stream(size, memory):
            asked.add(size)
            assert memory.numel() >= size * 16
            return inner.stream(size, memory)

        return LazyTensor(inner.shape, inner.dtype, inner.read, stream)

    rows = np.tile([0.5, 0.5], (averages, 1))
    job = Job('x', [watched(torch.ones(1000, dtype=torch.float64)) for _ in range(2)], ['a', 'b'], rows)
    with pieces_of(64):
        stream_averages([job], [Sink() for _ in range(averages)], 1)
    assert (asked, written) == ({64}, {64, 1000 % 64})


@pytest.mark.parametrize(
    ('checkpoints', 'averages', 'expected'),
    [
        # Pieces of 2^19 elements, and for each 16 bytes to read them and 4 for an average and two more.
        (2, 1, 2**19 * (16 + 4 * 3)),
        (1000, 1, 2**19 * (16 + 4 * 3)),
        (1000, 2, 2**19 * (16 + 4 * 4)),
        # For a matrix all checkpoints are there at a time, and so the pieces are smaller.
        (10, 3, 2**19 * (16 + 4 * 13)),
        (997, 3, 2**24 // 1000 * (16 + 4 * 1000)),
        # But not by any number.
        (9997, 3, 2**14 * (16 + 4 * 10000)),
    ],
)
def test_the_memory_is_known_beforehand(checkpoints, averages, expected):
    """Whatever the size of the model; each thread has its own."""
    assert scratch_bytes(checkpoints, averages, 1) == expected
    assert scratch_bytes(checkpoints, averages, 8) == 8 * expected


@given(rows=st.integers(1, 9).flatmap(lambda checkpoints: coefficient_rows(checkpoints, 4)), wide=st.booleans())
def test_no_more_memory_is_taken_than_is_known(rows, wide):
    """The more differences of checkpoints averages have, the smaller are the pieces."""
    tensors = [torch.ones(5000, dtype=torch.float64 if wide else torch.float32) for _ in rows[0]]
    taken, empty = [], torch.empty

    def watched(*args, **kwargs):
        taken.append(empty(*args, **kwargs))
        return taken[-1]

    job = job_of('x', tensors, rows)
    with pieces_of(512), mock.patch.object(torch, 'empty', watched):
        known = scratch_bytes(len(tensors), len(rows), 1)
        stream_averages([job], [Discard() for _ in rows], 1)
    assert sum(memory.nbytes for memory in taken) <= known * (1 + wide)
