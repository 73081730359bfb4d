# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Updates that a worker computes: the numbers of an update at once, seen by nobody before they are there."""

import contextlib
import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from composer_bema import functional as cf
from composer_bema.averaging import (
    BEMA,
    EMA,
    AverageState,
    ConstantDecay,
    SWAWindow,
    Window,
    bema_rule,
    dema_rule,
    ema_rule,
    kernels,
    offload,
    ouema_rule,
)
from composer_bema.averaging.rules import THETA, Lerp, LinearStep
from tests.averaging.offloading import LateStaging, Procrastinator, stand_in_for_gpu
from tests.averaging.test_state import assert_same, bits, clone, differ, move, weights_of

RULES = {
    'bema': bema_rule(0.5, 0.2),
    'ema': ema_rule(),
    'dema': dema_rule(),
    'ouema': ouema_rule(0.5, 0.2),
    'lawa': Window(2),
    'swa': SWAWindow(2),
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_gpu(monkeypatch)


def make_state(**kwargs: Any) -> AverageState:
    return AverageState(BEMA(alpha=ConstantDecay(0.5), beta=ConstantDecay(0.25)), device='cpu', **kwargs)


def follow(state: AverageState, model: torch.nn.Module, updates: int, then: Callable[[], None] = lambda: None) -> None:
    """Updates a state from a walk that is the same in every test, and does something after each of the updates."""
    torch.manual_seed(1)
    for step in range(1, updates + 1):
        move(model)
        state.update(model, step)
        then()


def saved(state: AverageState) -> dict[str, Any]:
    return copy.deepcopy(state.state_dict())


def computed_at_once(
    monkeypatch: pytest.MonkeyPatch, state: AverageState, model: torch.nn.Module, updates: int
) -> dict[str, Any]:
    """What a state is after updates at once."""
    with monkeypatch.context() as patch:
        patch.setattr(offload, 'is_offloaded', lambda updates: False)
        state.start(model)
        follow(state, model, updates)
        return saved(state)


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize('on_disk', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', RULES)
def test_the_numbers_are_those_of_updates_at_once(stand_in, monkeypatch, make_mlp, tmp_path, name, dtype, on_disk):
    """And the weights are those of the time of the update, whatever becomes of them as soon as it returns."""
    folder = tmp_path if on_disk else None
    expected = computed_at_once(
        monkeypatch, AverageState(RULES[name], snapshot_folder=folder), make_mlp(dtype=dtype), updates=5
    )
    model = make_mlp(dtype=dtype)
    state = AverageState(RULES[name], snapshot_folder=folder)
    state.start(model)

    def overwrite() -> None:
        """Holds garbage for as long as it takes to go on."""
        weights = weights_of(model)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(77)
        model.load_state_dict(weights)

    follow(state, model, 5, then=overwrite)
    assert_same(saved(state), expected)


def test_garbage_in_the_weights_after_an_update_is_not_averaged(stand_in, monkeypatch, make_mlp):
    """The copies arrive when the weights are gone already, and the numbers are right all the same."""
    expected = computed_at_once(monkeypatch, make_state(), make_mlp(), updates=1)
    model = make_mlp()
    state = make_state()
    state.start(model)
    before = clone(state.average())
    LateStaging.may_arrive.clear()
    follow(state, model, 1)
    # It has returned, it counts, and nothing was computed.
    assert state.num_updates == 1
    assert not differ({n: state._unawaited_groups[0].average[n] for n in ('0.weight', '4.bias')}, before)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(77)
    LateStaging.may_arrive.set()
    assert_same(saved(state), expected)


def test_the_training_thread_computes_nothing(stand_in, monkeypatch, make_mlp):
    threads = []
    apply_step = kernels.apply_step

    def watched(*args: Any) -> None:
        threads.append(threading.get_ident())
        apply_step(*args)

    monkeypatch.setattr(kernels, 'apply_step', watched)
    model = make_mlp()
    state = make_state()
    state.start(model)
    follow(state, model, 3)
    state.average()
    # Three groups, three times, in one thread.
    assert len(threads) == 9
    assert len(set(threads)) == 1 and threads[0] != threading.get_ident()


def test_the_worker_has_as_many_of_torchs_threads_as_the_caller(stand_in, monkeypatch, make_mlp):
    """Another average's worker, in the middle of an update, has told the process to have one."""
    before, counts = torch.get_num_threads(), []
    monkeypatch.setattr(kernels, 'apply_step', lambda *args: counts.append(torch.get_num_threads()))
    model = make_mlp()
    # A check of the weights would set the number again.
    state = make_state(nonfinite='ignore')
    state.start(model)
    try:
        torch.set_num_threads(3)
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()
        follow(state, model, 1)
        state.average()
    finally:
        torch.set_num_threads(before)
    assert set(counts) == {3}


def test_one_update_is_in_flight_at_most(stand_in, monkeypatch):
    """The next one waits before it copies: there is one copy of the weights, and the worker is still reading it."""
    monkeypatch.setattr(offload, 'ThreadPoolExecutor', Procrastinator)
    updater, theta, ema = offload.Updater(), torch.zeros(3), torch.zeros(3)
    for value in (8.0, 16.0, 32.0):
        theta.fill_(value)
        updater.apply([offload.Update(LinearStep((Lerp('ema', THETA, 0.5),), {}), [theta], {'ema': [ema]})])
    # Two are done, and the third is not: (0 + 8) / 2 = 4, (4 + 16) / 2 = 10, (10 + 32) / 2 = 21.
    assert ema.tolist() == [10.0] * 3
    updater.wait()
    assert ema.tolist() == [21.0] * 3


def test_the_copy_of_the_weights_is_kept_from_update_to_update(stand_in, make_mlp):
    """It is allocated anew only when other tensors are averaged: a parameter has frozen."""
    model = make_mlp()
    state = make_state()
    state.start(model)
    rooms = []

    def look() -> None:
        state.average()
        rooms.append([kept.data_ptr() for kept in state._updater._staging._room])

    follow(state, model, 3, then=look)
    model[0].weight.requires_grad_(False)
    follow(state, model, 1, then=look)
    assert rooms[0] == rooms[1] == rooms[2]
    assert [len(room) for room in rooms] == [9, 9, 9, 8]


@pytest.mark.parametrize(
    ('theta', 'kept', 'offloaded'),
    [
        (['cuda'], ['cpu'], True),
        # A module buffer that the model has in host memory goes along.
        (['cuda', 'cpu'], ['cpu', 'cpu'], True),
        (['cuda:0', 'cuda:1'], ['cpu', 'cpu'], True),
        (['cuda'], ['cuda'], False),
        (['cpu'], ['cpu'], False),
        # Snapshots on disk beside an average on the GPU.
        (['cuda', 'cuda'], ['cpu', 'cuda'], False),
        ([], [], False),
    ],
)
def test_the_worker_has_what_is_in_host_memory_and_follows_a_gpu(theta, kept, offloaded):
    with FakeTensorMode():
        weights, buffers = ([torch.empty(2, device=device) for device in devices] for devices in (theta, kept))
    update = offload.Update(LinearStep((Lerp('ema', THETA, 0.5),), {}), weights, {'ema': buffers})
    nothing = offload.Update(LinearStep((), {}), [], {'latest': []})
    assert offload.is_offloaded([update, nothing]) is offloaded


class OnFirst(torch.Tensor):
    """Passes for a tensor on the first GPU."""

    is_cuda = True
    device = torch.device('cuda:0')


class OnSecond(OnFirst):
    device = torch.device('cuda:1')


def test_copies_are_on_each_devices_own_stream_and_awaited_on_all(monkeypatch):
    """An event is recorded once all copies are enqueued; which values they have then is for a GPU to show."""
    log: list[tuple[str, Any]] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: str) -> None:
            log.append(('record', (stream, [kept.tolist() for kept in staging._room])))
            self.stream = stream

        def synchronize(self) -> None:
            log.append(('synchronize', (current[-1], self.stream)))

    current: list[Any] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(f'current of {device}')
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, 'device', on)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: f'current of {device}')
    monkeypatch.setattr(offload, 'pinned_like', lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    staging = offload.Staging()
    values = [torch.tensor([1.5, 2.5]), torch.tensor(3), torch.tensor([-1.0]), torch.tensor([True])]
    kinds = [OnFirst, OnSecond, OnFirst, torch.Tensor]
    copies, await_copies = staging.copy([t.as_subclass(kind) for t, kind in zip(values, kinds, strict=True)])
    assert [kept.tolist() for kept in copies] == [[1.5, 2.5], 3, [-1.0], [True]]
    streams = ['current of cuda:0', 'current of cuda:1']
    assert sorted(log) == [('record', (stream, [[1.5, 2.5], 3, [-1.0], [True]])) for stream in streams]
    log.clear()
    await_copies()
    assert sorted(log) == [('synchronize', (stream, stream)) for stream in streams]


def test_a_nonfinite_weight_is_refused_before_anything_is_copied(stand_in, make_mlp):
    model = make_mlp()
    state = make_state()
    state.start(model)
    follow(state, model, 1)
    before = saved(state)
    LateStaging.may_arrive.clear()
    with torch.no_grad():
        model[4].bias[2] = float('nan')
    with pytest.raises(FloatingPointError, match="After step 2 '4.bias' holds a NaN"):
        state.update(model, 2)
    # Nothing is in flight, or this would wait for ever.
    assert_same(saved(state), before)


# ------------------------------------------------------------------------------------------------------- who waits


def raw_buffers(state: AverageState) -> dict[str, dict[str, torch.Tensor]]:
    """The buffers as they are at this moment."""
    return {f'{i} {n}': clone(t) for i, group in enumerate(state._unawaited_groups) for n, t in group.buffers.items()}


def copied_to_another(state: AverageState, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    state.copy_to(twin)
    return weights_of(twin)


def seen_while_swapped(state: AverageState, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state.swap_in(model)
    try:
        return weights_of(model)
    finally:
        state.swap_out()


def seen_inside(state: AverageState, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with state.applied_to(model):
        return weights_of(model)


def shared(state: AverageState, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is sent to the other of two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        sent: list[torch.Tensor] = []
        patch.setattr(torch.distributed, 'is_initialized', lambda: True)
        patch.setattr(torch.distributed, 'get_world_size', lambda: 2)
        patch.setattr('composer_bema.averaging.state.share', sent.extend)
        state.share_module_buffers()
    return {str(i): tensor.clone() for i, tensor in enumerate(sent)}


def under_another_rule(state: AverageState, model: torch.nn.Module) -> dict[str, Any]:
    state.change_rule(BEMA(alpha=ConstantDecay(0.25), beta=ConstantDecay(0.5)))
    return raw_buffers(state)


def updated_again(state: AverageState, model: torch.nn.Module) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, 'is_offloaded', lambda updates: False)
        state.update(model, 2)
    return raw_buffers(state)


def started_again(state: AverageState, model: torch.nn.Module) -> dict[str, Any]:
    state.start(model)
    return raw_buffers(state)


def loaded(state: AverageState, model: torch.nn.Module) -> dict[str, Any]:
    other = make_state()
    other.start(model)
    state.load_state_dict(other.state_dict(), model)
    return raw_buffers(state)


def copied_and_pickled(state: AverageState, model: torch.nn.Module) -> dict[str, Any]:
    twins = [copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    for twin in twins:
        assert twin.num_updates == 1
    return {str(i): raw_buffers(twin) for i, twin in enumerate(twins)}


READERS: dict[str, Callable[[AverageState, torch.nn.Module], Any]] = {
    '__getstate__': copied_and_pickled,
    'applied_to': seen_inside,
    'average': lambda state, model: clone(state.average()),
    'averaged_state_dict': lambda state, model: state.averaged_state_dict(model),
    'change_rule': under_another_rule,
    'copy_to': copied_to_another,
    'distance': lambda state, model: {'distance': state.distance(model)},
    'load_state_dict': loaded,
    'share_module_buffers': shared,
    'start': started_again,
    'state_dict': lambda state, model: saved(state),
    'swap_in': seen_while_swapped,
    'update': updated_again,
}
# Those that touch no buffer, or are of use only while the model holds the average, when nothing is in flight.
NO_READERS = {'copy_training_weights_to', 'started', 'swap_out', 'swapped'}


def test_who_uses_the_buffers_is_known():
    """A new method belongs to one of them; if it uses the buffers, the tests below have to see that it waits."""
    public = {name for name in vars(AverageState) if not name.startswith('_')}
    assert {*READERS, *NO_READERS} - {'__getstate__'} == public
    assert '__getstate__' in vars(AverageState)


@pytest.mark.parametrize('name', READERS)
def test_whoever_uses_the_buffers_waits(stand_in, monkeypatch, make_mlp, name):
    """The worker does nothing before it is waited for, so that who does not wait sees what was there before."""
    monkeypatch.setattr(offload, 'ThreadPoolExecutor', Procrastinator)

    def answer(is_offloaded: bool) -> Any:
        monkeypatch.setattr(offload, 'is_offloaded', lambda updates: is_offloaded)
        model, state = make_mlp(), make_state()
        state.start(model)
        before = raw_buffers(state)
        follow(state, model, 1)
        if is_offloaded:
            assert_same(raw_buffers(state), before)
        result = READERS[name](state, model)
        if is_offloaded:
            assert all(future.done for future in state._updater._worker.undone), 'it is in flight still'
        return result

    assert_same(answer(is_offloaded=True), answer(is_offloaded=False))


@pytest.mark.parametrize('name', sorted(NO_READERS - {'copy_training_weights_to'}))
def test_what_touches_no_buffer_does_not_wait(stand_in, make_mlp, name):
    """`started` is asked after every step of a training."""
    model, state = make_mlp(), make_state()
    state.start(model)
    LateStaging.may_arrive.clear()
    follow(state, model, 1)
    value = getattr(state, name)
    assert (value() if callable(value) else value) in (None, name == 'started')
    assert not state._updater._newest.done()
    LateStaging.may_arrive.set()


def test_a_copy_of_a_state_goes_on_by_itself(stand_in, monkeypatch, make_mlp):
    expected = computed_at_once(monkeypatch, make_state(), make_mlp(), updates=2)
    model, state = make_mlp(), make_state()
    state.start(model)
    follow(state, model, 2)
    twin = copy.deepcopy(state)
    move(model)
    state.update(model, 3)
    assert_same(saved(twin), expected)
    twin.update(model, 3)
    assert_same(saved(twin), saved(state))


def test_a_state_can_be_loaded_from_its_own_memory(stand_in, monkeypatch, make_mlp):
    """What was saved has changed with the update, whether or not that is over: it is refused, and nothing is torn."""
    monkeypatch.setattr(offload, 'ThreadPoolExecutor', Procrastinator)
    model, state = make_mlp(), make_state()
    state.start(model)
    memory = state.state_dict()
    follow(state, model, 1)
    with pytest.raises(ValueError, match='are not those that were saved'):
        state.load_state_dict(memory, model)


def test_a_loop_is_averaged_off_its_thread(stand_in, monkeypatch, make_mlp):
    """Through the functional face, with steps between updates."""

    def run() -> dict[str, Any]:
        model = make_mlp()
        state = cf.init_bema(model, update_freq=3, device='cpu')
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(2)
        for _ in range(10):
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            cf.compute_bema(model, state)
        assert state.num_updates == 3
        return saved(state)

    offloaded = run()
    monkeypatch.setattr(offload, 'is_offloaded', lambda updates: False)
    assert_same(offloaded, run())


EXIT = """
import time
import torch
from composer_bema.averaging import AverageState, kernels, offload, ema_rule
from tests.averaging.offloading import stand_in_for_gpu
import pytest

stand_in_for_gpu(pytest.MonkeyPatch())
# So large that the worker has helpers.
torch.set_num_threads(3)
model = torch.nn.Linear(2048, 2048)
state = AverageState(ema_rule())
state.start(model)
apply_step = kernels.apply_step

def slowly(*args):
    time.sleep(0.1)
    apply_step(*args)
    print('applied', flush=True)

kernels.apply_step = slowly
state.update(model, 1)
print('the end', flush=True)
"""


def test_the_end_of_the_process_waits():
    """A process that ended in the middle of an update would crash, or lose what a snapshot's file gets."""
    result = subprocess.run([sys.executable, '-c', EXIT], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split('\n')[-4:] == ['applied', 'applied', 'applied', '']
    assert 'the end' in result.stdout


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def failed(stand_in, monkeypatch, make_mlp) -> tuple[AverageState, torch.nn.Module, dict[str, Any]]:
    """A state whose second update failed after its first group, its model, and what was saved before."""
    model, state = make_mlp(), make_state()
    state.start(model)
    follow(state, model, 1)
    before = saved(state)
    apply_step = kernels.apply_step
    calls = []

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError('no room for a chunk')
        apply_step(*args)

    monkeypatch.setattr(kernels, 'apply_step', fail)
    move(model)
    state.update(model, 2)
    return state, model, before


@pytest.mark.parametrize('name', sorted(READERS.keys() - {'start', 'load_state_dict'}))
def test_an_error_of_the_worker_reaches_whoever_uses_the_buffers(failed, name):
    """Every one of them, again and again: a part of the average lacks an update, and nobody may take it for whole."""
    state, model, _ = failed
    training = weights_of(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='last update failed.*no room for a chunk') as error:
            READERS[name](state, model)
        assert isinstance(error.value.__cause__, MemoryError)
    assert not state.swapped
    assert_same(weights_of(model), training)


def test_a_state_whose_update_failed_goes_on_from_a_saved_one(failed):
    state, model, before = failed
    state.load_state_dict(before, model)
    assert state.num_updates == 1
    assert_same(saved(state), before)
    assert state.update(model, 2) is not None
    assert differ(state.average(), before['buffers']['bema'])


def test_a_state_whose_update_failed_can_start_anew(failed):
    state, model, _ = failed
    state.start(model)
    assert state.num_updates == 0
    assert bits(state.average()['0.weight']) == bits(model[0].weight)


def test_a_load_that_fails_forgets_no_error(failed):
    state, model, before = failed
    del before['buffers']['bema']['0.weight']
    with pytest.raises(ValueError, match="lacks the values of '0.weight'"):
        state.load_state_dict(before, model)
    with pytest.raises(RuntimeError, match='last update failed'):
        state.average()


def test_copies_that_cannot_be_made_leave_the_average_as_it_was(stand_in, monkeypatch, make_mlp):
    model, state = make_mlp(), make_state()
    state.start(model)
    before = saved(state)

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError('no pinned memory left')

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match='no pinned memory left'):
        patch.setattr(offload, 'pinned_like', full)
        follow(state, model, 1)
    assert state.num_updates == 0
    assert_same(saved(state), before)
    follow(state, model, 1)
    assert state.num_updates == 1


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(make_mlp, dtype):
    """Large weights, overwritten by the kernels that are enqueued as soon as an update returns."""
    on_gpu, on_cpu = (torch.nn.Linear(8192, 4096, dtype=dtype) for _ in range(2))
    on_cpu.load_state_dict(on_gpu.state_dict())
    on_gpu.cuda()
    states = [make_state(nonfinite='ignore') for _ in range(2)]
    for state, model in zip(states, (on_gpu, on_cpu), strict=True):
        state.start(model)
        for step in range(1, 6):
            with torch.no_grad():
                model.weight.fill_(step / 2)
                model.bias.fill_(-step)
            state.update(model, step)
            with torch.no_grad():
                model.weight.fill_(float('inf'))
                model.bias.fill_(float('inf'))
    assert_same(states[0].state_dict(), states[1].state_dict())
    assert states[0]._updater._staging._room[0].is_pinned()


@pytest.mark.gpu
def test_on_a_gpu_an_update_belongs_where_it_is_on_its_stream():
    """The stream is busy when everything is enqueued, so that nothing but the order of the stream helps."""
    model = torch.nn.Linear(4096, 4096, bias=False).cuda()
    state = AverageState(EMA(beta=ConstantDecay(1.0)), device='cpu', nonfinite='ignore')
    state.start(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        model.weight.fill_(3.0)
        state.update(model, 1)
        model.weight.fill_(4.0)
    assert bits(state.average()['weight']) == bits(torch.full((4096, 4096), 3.0))
