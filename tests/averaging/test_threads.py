# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Every item is done once, whoever does it, and nothing of the threads is left behind."""

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from composer_bema.averaging.threads import share_out


@pytest.fixture(params=[1, 3], ids=['one thread', 'three threads'])
def most(request: pytest.FixtureRequest) -> Iterator[int]:
    """The most threads; torch is told to have as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(function: Callable) -> Callable[[], Callable]:
    return lambda: function


def test_results_come_in_the_order_of_the_items(most):
    assert share_out(same(lambda item: 2 * item), iter(range(1000)), most) == list(range(0, 2000, 2))
    assert share_out(same(str), [], most) == []


def test_threads_work_at_the_same_time_and_each_has_a_worker_of_its_own(most):
    """Each waits for the others, which would never come if one thread did all the items."""
    together = threading.Barrier(most, timeout=60)
    threads = []

    def make_worker() -> Callable[[int], int]:
        used_by = set()
        threads.append(used_by)

        def work(item: int) -> int:
            used_by.add(threading.get_ident())
            return together.wait()

        return work

    share_out(make_worker, range(2 * most), most)
    assert [len(used_by) for used_by in threads] == [1] * most
    assert len(set.union(*threads)) == most
    assert threading.get_ident() in threads[0]


def test_nothing_is_done_where_a_worker_cannot_be_made(most):
    done, made = [], []

    def make_worker() -> Callable[[int], None]:
        made.append(len(made))
        if len(made) == most:
            raise MemoryError
        return done.append

    with pytest.raises(MemoryError):
        share_out(make_worker, range(10), most)
    assert not done
    assert torch.get_num_threads() == most


def test_there_are_no_more_threads_than_there_is_work_for(most):
    workers = share_out(same(lambda item: threading.get_ident()), range(100), most=1)
    assert set(workers) == {threading.get_ident()}


def test_operations_run_on_one_thread_and_later_ones_on_as_many_as_before(most):
    assert set(share_out(same(lambda item: torch.get_num_threads()), range(100), most)) == {1}
    assert torch.get_num_threads() == most
    assert count_in_new_thread() == most


def test_an_error_ends_the_work_and_leaves_the_number_of_threads_alone(most):
    def fail_early(item: int) -> None:
        if item == 5:
            raise ValueError('the fifth')

    with pytest.raises(ValueError, match='the fifth'):
        share_out(same(fail_early), itertools.count(), most)
    assert torch.get_num_threads() == most
    assert count_in_new_thread() == most


def count_in_new_thread() -> int:
    counts = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counts[0]


@pytest.mark.parametrize('inference', [True, False])
def test_threads_have_the_modes_of_the_caller_but_no_gradients(most, inference):
    """In inference mode tensors are made that can be changed in place only there."""
    with torch.inference_mode(inference):
        tensors = [torch.zeros(2) for _ in range(50)]
        weight = torch.ones(2, requires_grad=not inference)
        share_out(same(lambda tensor: tensor.add_(weight)), tensors, most)
    assert all(tensor.tolist() == [1, 1] and not tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize('most', [3], indirect=True)
def test_where_no_thread_can_be_had_the_work_is_done_all_the_same(most, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', fail)
    assert share_out(same(lambda item: 2 * item), range(10), most) == list(range(0, 20, 2))


@pytest.mark.parametrize('most', [2], indirect=True)
def test_an_interruption_while_waiting_leaves_no_thread_at_work(most, monkeypatch):
    main, has_begun, may_end = threading.current_thread(), threading.Event(), threading.Event()
    interruptions = iter([KeyboardInterrupt('^C'), KeyboardInterrupt('^C again')])
    join = threading.Thread.join

    def interrupted(thread, timeout=None):
        error = next(interruptions, None)
        if error is not None:
            raise error
        may_end.set()
        join(thread, timeout)

    def work(item):
        if threading.current_thread() is main:
            has_begun.wait()
        else:
            has_begun.set()
            may_end.wait()
            ended.append(item)

    monkeypatch.setattr(threading.Thread, 'join', interrupted)
    ended = []
    with pytest.raises(KeyboardInterrupt):
        share_out(same(work), range(2), most)
    assert len(ended) == 1
