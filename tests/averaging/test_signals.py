# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Signals that come while weights are exchanged or averages updated."""

import signal
import threading

import pytest
import torch

from composer_bema.averaging import kernels
from composer_bema.averaging.rules import ema_rule
from composer_bema.averaging.signals import uninterrupted
from composer_bema.averaging.state import AverageState


class Terminated(Exception):
    """What a handler of SIGTERM may raise."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def number(request):
    """A signal that raises; ^C is ignored where the tests are run in the background."""

    def terminate(received, frame):
        raise Terminated

    before = handlers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGALRM, terminate)
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}


def test_a_signal_waits_for_the_end_of_the_block(number):
    done, before = [], handlers()
    with pytest.raises((KeyboardInterrupt, Terminated)), uninterrupted():
        signal.raise_signal(number)
        done.append(True)
    assert done
    assert handlers() == before


def test_an_error_in_the_block_is_raised_and_signals_are_handled_as_before(number):
    before = handlers()
    with pytest.raises(ValueError, match='of its own'), uninterrupted():
        raise ValueError('of its own')
    assert handlers() == before


def test_other_threads_are_let_alone():
    seen = []

    def look():
        with uninterrupted():
            seen.append(handlers())

    thread = threading.Thread(target=look)
    before = handlers()
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.fixture
def started():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
    state = AverageState(ema_rule(half_life=1.0))
    state.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    state.update(model, 1)
    return model, state


def signal_after(monkeypatch, name, call, number):
    """Sends a signal right after a kernel has done its work for that time."""
    function, calls = getattr(kernels, name), []

    def interrupted(*args):
        function(*args)
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)

    monkeypatch.setattr(kernels, name, interrupted)


@pytest.mark.parametrize('call', [1, 3, 4, 6])
def test_no_weights_stay_swapped(started, monkeypatch, number, call):
    """In three exchanges on the way in, and three on the way out, as of what takes a launch each."""
    model, state = started
    monkeypatch.setattr(kernels, 'exchange_groups', lambda left, right: [[i] for i in range(len(left))])
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    average = {name: tensor.clone() for name, tensor in state.average().items()}
    signal_after(monkeypatch, 'exchange', call, number)
    with pytest.raises((KeyboardInterrupt, Terminated)), state.applied_to(model):
        pass
    state.swap_out()
    assert not state.swapped
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(state.average()[name], tensor) for name, tensor in average.items())


def test_an_update_is_whole_and_counted(started, monkeypatch, number):
    model, state = started
    signal_after(monkeypatch, 'apply_step', 1, number)
    with pytest.raises((KeyboardInterrupt, Terminated)):
        state.update(model, 2)
    assert state.num_updates == 2
