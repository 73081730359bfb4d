# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What an average remembers of a model, and that no weight is lost on the way into the model and back."""

import copy
import gc
import io
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from composer_bema.averaging import BEMA, EMA, AverageState, ConstantDecay, bema_rule, ema_rule, kernels
from composer_bema.averaging.digests import digests_of
from composer_bema.averaging.sharding import FlatShard

ALPHA, BETA = 0.5, 0.25
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MakeModel = Callable[..., torch.nn.Module]


def make_state(**kwargs: Any) -> AverageState:
    """BEMA with coefficients that are easy to follow by hand."""
    return AverageState(BEMA(alpha=ConstantDecay(ALPHA), beta=ConstantDecay(BETA)), **kwargs)


def move(model: torch.nn.Module) -> None:
    """Changes what training changes: the trainable parameters, and the statistics and counts of BatchNorm."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64).to(parameter), alpha=0.1)
        for buffer in model.buffers():
            buffer.add_(torch.rand(buffer.shape).to(buffer) if buffer.is_floating_point() else 1)


def started(model: torch.nn.Module, **kwargs: Any) -> AverageState:
    state = make_state(**kwargs)
    state.start(model)
    return state


def averaging(model: torch.nn.Module, updates: int = 3, **kwargs: Any) -> AverageState:
    """A state that has followed a few steps of the model."""
    state = started(model, **kwargs)
    for step in range(1, updates + 1):
        move(model)
        state.update(model, step)
    return state


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def buffers_of(state: AverageState) -> dict[str, dict[str, torch.Tensor]]:
    return {name: clone(local_values(tensors)) for name, tensors in state.state_dict()['buffers'].items()}


def local_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.local.view(t.shard.shape) if isinstance(t, FlatShard) else t for n, t in tensors.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Asserts that two nested dicts of tensors and numbers agree, tensors bit for bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Mapping):
            assert_same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (other[key].dtype, other[key].shape), key
            assert bits(value) == bits(other[key]), key
        else:
            assert value == other[key], key


def differ(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return any(bits(one[name]) != bits(other[name]) for name in one)


def saved_and_loaded(state: Any) -> Any:
    """Through a file, as a reader that executes nothing sees it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def ddp(model: torch.nn.Module) -> DistributedDataParallel:
    """What DDP makes of a model's names, without the process group that its constructor asks for."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    wrapper = torch.nn.Module()
    wrapper.add_module('_orig_mod', model)
    return wrapper


class Tied(torch.nn.Module):
    """An embedding and a head that are one parameter, and a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer('mask', torch.full((3,), -math.inf), persistent=False)


class Mixed(torch.nn.Module):
    """Parameters of many dtypes and shapes, a 0-d and an empty one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(3, 2).to(dtype) for dtype in DTYPES)
        self.scalar = torch.nn.Parameter(torch.tensor(1.5))
        self.empty = torch.nn.Parameter(torch.empty(0, 4))
        self.turned = torch.nn.Parameter(torch.randn(4, 3).t())
        self.norm = torch.nn.BatchNorm1d(2).bfloat16()


# ---------------------------------------------------------------------------------------------------------- snapshot


def test_the_buffers_start_as_copies_of_the_weights(make_mlp):
    """The live weights move on without them: a shared storage would make theta_0 follow the model."""
    model = make_mlp()
    state = started(model)
    at_start = weights_of(model)
    move(model)
    assert differ(at_start, weights_of(model))
    buffers = buffers_of(state)
    trainable = ['0.weight', '0.bias', '1.weight', '1.bias', '4.weight', '4.bias']
    assert list(buffers['theta_0']) == list(buffers['bema']) == trainable
    assert list(buffers['ema']) == [*trainable, '1.running_mean', '1.running_var']
    assert list(buffers['latest']) == ['1.num_batches_tracked']
    for tensors in buffers.values():
        assert_same({n: t.to(at_start[n].dtype) for n, t in tensors.items()}, {n: at_start[n] for n in tensors})


@pytest.mark.parametrize(
    ('dtype', 'buffer_dtype'),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_averages_are_kept_in_at_least_fp32(make_mlp, dtype, buffer_dtype):
    buffers = buffers_of(averaging(make_mlp(dtype=dtype)))
    assert {t.dtype for n in ('ema', 'bema') for t in buffers[n].values()} == {buffer_dtype}
    assert buffers['latest']['1.num_batches_tracked'].dtype == torch.int64


@pytest.mark.parametrize(
    ('dtype', 'exact', 'kept_in'),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, True, torch.float16),
        # A model in fp32 that was loaded from bf16 weights.
        (torch.float32, True, torch.bfloat16),
        (torch.float64, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float64, False, torch.float64),
    ],
)
def test_theta_0_is_kept_small_where_that_loses_nothing(dtype, exact, kept_in):
    model = torch.nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.0], [0.15625, 3.0e4 if dtype == torch.float16 else 2.0**100]]))
        if not exact:
            model.weight[0, 0] = 1 + 2**-20
    theta_0 = started(model).state_dict()['buffers']['theta_0']['weight']
    assert theta_0.dtype == kept_in
    assert bits(theta_0.to(dtype)) == bits(model.weight)


def test_an_fp64_theta_0_is_not_cut_to_fp32():
    model = torch.nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1 + 2**-40)
    assert started(model).state_dict()['buffers']['theta_0']['weight'].item() == 1 + 2**-40


def test_a_model_without_trainable_parameters_is_an_error(make_mlp):
    with pytest.raises(ValueError, match='no trainable parameters, so there is nothing to average'):
        started(make_mlp().requires_grad_(False))


def test_a_wrong_way_to_treat_nonfinite_weights_is_an_error():
    with pytest.raises(ValueError, match="nonfinite must be 'raise', 'skip' or 'ignore', but is 'warn'"):
        make_state(nonfinite='warn')


@pytest.mark.parametrize('device', ['cpuu', '', 'cpu:one', 2.5])
def test_a_device_that_is_none_is_an_error_that_names_it(device):
    with pytest.raises(ValueError, match='^device must be None or the name of a device such as') as error:
        make_state(device=device)
    assert f"'cpu', but is {device!r}." in str(error.value)


@pytest.mark.parametrize('device', ['cpu', torch.device('cpu')])
def test_a_device_goes_by_its_name_or_itself(make_mlp, device):
    state = started(make_mlp(), device=device)
    assert state.device == torch.device('cpu')
    assert make_state(device=None).device is None


def test_starting_again_takes_the_weights_anew(make_mlp):
    model = make_mlp()
    state = averaging(model)
    state.num_skipped = 2
    state.start(model)
    assert (state.num_updates, state.num_skipped) == (0, 0)
    assert_same(buffers_of(state), buffers_of(started(model)))


# ------------------------------------------------------------------------------------------------------------ update


def test_an_update_is_the_two_equations_of_the_paper(make_mlp):
    model = make_mlp()
    state = started(model)
    theta_0 = weights_of(model)
    ema = {n: t.double() for n, t in theta_0.items()}
    for step in (1, 2, 3):
        move(model)
        theta = weights_of(model)
        assert state.update(model, step) == {'alpha': ALPHA, 'beta': BETA}
        ema = {n: (1 - BETA) * ema[n] + BETA * theta[n].double() for n in ema}
    buffers, average = buffers_of(state), state.average()
    for n in buffers['theta_0']:
        torch.testing.assert_close(buffers['ema'][n].double(), ema[n], rtol=0, atol=1e-6)
        bema = ema[n] + ALPHA * (theta[n].double() - theta_0[n].double())
        torch.testing.assert_close(average[n].double(), bema, rtol=0, atol=1e-6)
    assert state.num_updates == 3


def test_bema_never_corrects_batch_statistics(make_mlp):
    """A variance that shrinks fast: the EMA stays positive, where the corrected one would not."""
    model = make_mlp()
    model[1].running_var.fill_(100.0)
    state = started(model)
    model[1].running_var.fill_(1.0)
    state.update(model, 1)
    # 3/4 100 + 1/4 1 = 75.25, and the correction 1/2 (1 - 100) would leave 25.75; a second step would go below 0.
    torch.testing.assert_close(state.average()['1.running_var'], torch.full((8,), 75.25), rtol=0, atol=1e-5)
    for step in range(2, 20):
        state.update(model, step)
    average = state.average()['1.running_var']
    assert 100 * 0.75**19 + 1 - 0.75**19 - ALPHA * 99 < 0 < average.min()
    assert '1.running_var' not in state.state_dict()['buffers']['theta_0']


@pytest.mark.parametrize('average_buffers', [True, False])
def test_module_buffers_are_averaged_or_copied(make_mlp, average_buffers):
    model = make_mlp()
    model[1].running_mean.fill_(0.0)
    state = started(model, average_buffers=average_buffers)
    model[1].running_mean.fill_(8.0)
    model[1].num_batches_tracked.fill_(7)
    state.update(model, 1)
    average = state.average()
    assert torch.equal(average['1.running_mean'], torch.full((8,), 2.0 if average_buffers else 8.0))
    assert average['1.num_batches_tracked'].item() == 7


def test_caches_of_a_module_are_left_alone():
    """A mask of -inf that no state dict holds is neither averaged, nor checked, nor swapped."""
    model = Tied()
    state = averaging(model)
    assert 'mask' not in state.average()
    with state.applied_to(model):
        assert model.mask.tolist() == [-math.inf] * 3
    assert 'mask' not in state.averaged_state_dict(model)


def test_a_mask_that_is_only_copied_may_be_infinite(make_mlp):
    """`average_buffers=False` is what a model with a persistent mask of -inf needs."""
    model = make_mlp()
    model.register_buffer('mask', torch.full((3,), -math.inf))
    state = started(model, average_buffers=False)
    state.update(model, 1)
    assert state.average()['mask'].tolist() == [-math.inf] * 3
    # What is averaged is looked at all the same.
    with torch.no_grad():
        model[4].bias[2] = math.nan
    with pytest.raises(FloatingPointError, match="After step 2 '4.bias' holds"):
        state.update(model, 2)


def test_a_statistic_that_is_only_copied_may_be_nonfinite(make_mlp):
    """The next update replaces it, so it cannot poison the average."""
    model = make_mlp()
    state = averaging(model, average_buffers=False)
    for value in (math.nan, 2.0):
        model[1].running_var.fill_(value)
        assert state.update(model, 4) is not None
    assert state.average()['1.running_var'].tolist() == [2.0] * 8
    assert state.num_skipped == 0


def test_a_parameter_that_freezes_keeps_its_average(make_mlp):
    """It is no longer updated, but still belongs to the average: swapped, saved and loaded."""
    model = make_mlp()
    state = averaging(model)
    model[0].requires_grad_(False)
    kept = {name: clone(tensors) for name, tensors in buffers_of(state).items()}
    for step in (4, 5):
        move(model)
        state.update(model, step)
    now = buffers_of(state)
    for name in ('theta_0', 'ema', 'bema'):
        for n in ('0.weight', '0.bias'):
            assert bits(now[name][n]) == bits(kept[name][n])
    assert differ({'4.weight': now['ema']['4.weight']}, {'4.weight': kept['ema']['4.weight']})
    with state.applied_to(model):
        assert bits(model[0].weight) == bits(kept['bema']['0.weight'])
    resumed = make_state()
    resumed.load_state_dict(state.state_dict(), model)
    assert_same(buffers_of(resumed), now)


def test_a_newly_trainable_parameter_is_an_error_that_names_it(make_mlp):
    model = make_mlp()
    state = averaging(model)
    before = buffers_of(state)
    model[3].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameter '3.weight' is trainable but has no average: .* shrink"):
        state.update(model, 4)
    assert_same(buffers_of(state), before)
    assert state.num_updates == 3


@pytest.mark.parametrize(
    'act',
    [
        lambda state, model: state.update(model, 1),
        lambda state, model: state.swap_in(model),
        lambda state, model: state.distance(model),
    ],
    ids=['update', 'swap_in', 'distance'],
)
def test_what_needs_buffers_is_an_error_before_the_start(make_mlp, act):
    state, model = make_state(), make_mlp()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r'^The average has no buffers yet: call start\(model\) first\.$'):
        act(state, model)
    assert_same(weights_of(model), before)
    assert (state.started, state.swapped, state.num_updates) == (False, False, 0)


@pytest.mark.parametrize('start', [False, True])
@pytest.mark.parametrize(
    'act',
    [lambda state, model: state.copy_to(model), lambda state, model: state.averaged_state_dict(model)],
    ids=['copy_to', 'averaged_state_dict'],
)
def test_there_is_no_average_to_give_before_the_first_update(make_mlp, act, start):
    """The weights of the start would pass for an average."""
    model = make_mlp()
    state = started(model) if start else make_state()
    move(model)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match='^There was no update yet'):
        act(state, model)
    assert_same(weights_of(model), before)
    if start:
        state.update(model, 1)
        act(state, model)


def test_a_skipped_update_gives_no_average(make_mlp):
    model = make_mlp()
    state = started(model, nonfinite='skip')
    with torch.no_grad():
        model[4].bias[2] = math.nan
    assert state.update(model, 1) is None
    with pytest.raises(RuntimeError, match='^There was no update yet'):
        state.copy_to(model)


def test_the_step_and_the_elapsed_time_reach_the_schedules(make_mlp):
    model = make_mlp()
    state = AverageState(bema_rule(half_life=10))
    state.start(model)
    coefficients = state.update(model, step=22, elapsed=10.0)
    assert coefficients == {'alpha': 32**-0.2, 'beta': pytest.approx(0.5, abs=1e-15)}


# --------------------------------------------------------------------------------------------------- non-finite weights


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_nonfinite_weight_raises_and_leaves_the_average_as_it_was(make_mlp, dtype, bad):
    """The bad value sits in the last tensor, so that an update that checked as it went would have begun."""
    model = make_mlp(dtype=dtype)
    state = averaging(model)
    before = state.num_updates, buffers_of(state)
    move(model)
    with torch.no_grad():
        model[4].bias[2] = bad
    with pytest.raises(
        FloatingPointError, match=r"After step 12 '4.bias' holds a NaN or an infinity.*nonfinite='skip'"
    ):
        state.update(model, 12)
    assert (state.num_updates, state.num_skipped) == (before[0], 0)
    assert_same(buffers_of(state), before[1])


def test_a_nonfinite_weight_can_be_skipped_and_is_counted(make_mlp):
    model = make_mlp()
    state = averaging(model, nonfinite='skip')
    before = buffers_of(state)
    good = weights_of(model)
    with torch.no_grad():
        model[4].bias[2] = math.nan
    assert state.update(model, 4) is None
    assert (state.num_updates, state.num_skipped) == (3, 1)
    assert_same(buffers_of(state), before)
    model.load_state_dict(good)
    assert state.update(model, 5) is not None
    assert (state.num_updates, state.num_skipped) == (4, 1)
    assert differ(before['ema'], buffers_of(state)['ema'])


def test_a_nonfinite_weight_can_be_ignored_and_then_poisons(make_mlp):
    model = make_mlp()
    state = averaging(model, nonfinite='ignore')
    with torch.no_grad():
        model[4].bias[2] = math.nan
    assert state.update(model, 4) is not None
    assert state.average()['4.bias'].isnan().tolist() == [False, False, True]


def test_a_nonfinite_batch_statistic_is_named(make_mlp):
    model = make_mlp()
    state = averaging(model)
    model[1].running_var[3] = math.inf
    with pytest.raises(FloatingPointError, match="After step 4 '1.running_var' holds"):
        state.update(model, 4)


def test_a_frozen_weight_is_not_looked_at(make_mlp):
    model = make_mlp()
    state = averaging(model)
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    state.update(model, 4)


# -------------------------------------------------------------------------------------------------------------- swap

MODELS: dict[str, Callable[[MakeModel], torch.nn.Module]] = {
    **{str(dtype).removeprefix('torch.'): lambda make, dtype=dtype: make(dtype=dtype) for dtype in DTYPES},
    'tied': lambda make: Tied(),
    'tied bfloat16': lambda make: Tied().bfloat16(),
    'mixed': lambda make: Mixed(),
    'complex64': lambda make: torch.nn.Linear(2, 2, dtype=torch.complex64),
}


@pytest.mark.parametrize('device', [None, 'cpu'])
@pytest.mark.parametrize('name', MODELS)
def test_a_swap_is_bit_exact_both_ways(make_mlp, name, device):
    """Neither the training weights nor the average change by a bit, however often they trade places."""
    model = MODELS[name](make_mlp)
    state = averaging(model, device=device)
    training, average, buffers = weights_of(model), clone(state.average()), buffers_of(state)
    for _ in range(3):
        state.swap_in(model)
        assert state.swapped
        inside = weights_of(model)
        assert_same({n: inside[n] for n in average}, {n: t.to(inside[n].dtype) for n, t in average.items()})
        assert differ({n: inside[n] for n in average}, training)
        state.swap_out()
        assert not state.swapped
        assert_same(weights_of(model), training)
        assert_same(buffers_of(state), buffers)


def test_a_swap_keeps_values_that_arithmetic_would_not(make_mlp):
    """NaNs with payloads and negative zeros in the training weights survive, since values are copied, not computed."""
    model = make_mlp()
    state = averaging(model)
    with torch.no_grad():
        model[0].weight.view(torch.int32)[0, :3] = torch.tensor([0x7F800001, -0x80000000, -0x3FFFFE])
    training = weights_of(model)
    with state.applied_to(model):
        pass
    assert_same(weights_of(model), training)


def test_a_swap_leaves_the_frozen_weights_alone(make_mlp):
    model = make_mlp()
    state = averaging(model)
    frozen = weights_of(model)['3.weight']
    with state.applied_to(model):
        assert bits(model[3].weight) == bits(frozen)


def test_a_swap_keeps_the_memory_that_optimizers_and_buckets_point_at(make_mlp):
    model = make_mlp()
    state = averaging(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with state.applied_to(model):
        assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_training_weights_come_back_whatever_happens_inside(make_mlp):
    model = make_mlp()
    state = averaging(model)
    training, average = weights_of(model), clone(state.average())
    with pytest.raises(KeyError, match='inside'), state.applied_to(model) as inside:
        assert inside is model
        assert bits(model[4].weight) == bits(average['4.weight'])
        raise KeyError('inside')
    assert_same(weights_of(model), training)
    assert_same(state.average(), average)


@pytest.mark.parametrize(
    ('call', 'act'),
    [
        ('swap_in', lambda state, model: state.swap_in(model)),
        ('update', lambda state, model: state.update(model, 4)),
        ('start', lambda state, model: state.start(model)),
        ('distance', lambda state, model: state.distance(model)),
        ('load_state_dict', lambda state, model: state.load_state_dict(state.state_dict(), model)),
    ],
)
def test_what_needs_the_training_weights_refuses_the_average(make_mlp, call, act):
    """Averaging averages, or a second swap that loses the training weights, would go unnoticed."""
    model = make_mlp()
    state = averaging(model)
    state.swap_in(model)
    before = weights_of(model), buffers_of(state)
    with pytest.raises(RuntimeError, match=f'{call} needs the training weights in the model.*swap_out first'):
        act(state, model)
    assert_same(weights_of(model), before[0])
    assert_same(buffers_of(state), before[1])
    assert state.swapped


def test_swapping_out_twice_is_harmless(make_mlp):
    model = make_mlp()
    state = averaging(model)
    training = weights_of(model)
    state.swap_out()
    state.swap_in(model)
    state.swap_out()
    state.swap_out()
    assert_same(weights_of(model), training)


def test_a_swap_into_another_model_is_an_error_that_touches_nothing(make_mlp):
    state = averaging(make_mlp())
    other = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(9))
    before = weights_of(other)
    with pytest.raises(ValueError, match=r"average of '1.weight' has the shape \(8,\), but the model's has \(9,\)"):
        state.swap_in(other)
    assert not state.swapped
    assert_same(weights_of(other), before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_average_can_be_read_while_swapped(make_mlp, dtype):
    """Wherever the values are at the moment, `average()` finds them."""
    model = make_mlp(dtype=dtype)
    state = averaging(model)
    training, average, averaged = weights_of(model), clone(state.average()), state.averaged_state_dict(model)
    with state.applied_to(model):
        assert_same(state.average(), average)
        assert_same(state.averaged_state_dict(model), averaged)
        other = copy.deepcopy(model)
        state.copy_training_weights_to(other)
        assert_same(weights_of(other), training)
        state.copy_to(other)
        assert_same(weights_of(other), averaged)
    assert_same(weights_of(model), training)


def test_training_weights_rest_here_only_while_swapped(make_mlp):
    model = make_mlp()
    with pytest.raises(RuntimeError, match='training weights are in the model that is being trained, not here'):
        averaging(model).copy_training_weights_to(model)


def test_parameters_that_share_memory_without_being_one_come_back():
    """Tied by hand, `b.weight.data = a.weight.data`: two parameters, one piece of memory."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight.data = model[0].weight.data
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    with state.applied_to(model):
        pass
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


@pytest.mark.parametrize('back', [lambda model: model, lambda model: model.float()], ids=['stays', 'and back'])
def test_training_weights_come_back_to_a_model_that_is_cast_inside(make_mlp, back):
    """As `model.to(...)` does, for an evaluation on another device or in another dtype."""
    model = make_mlp()
    state = averaging(model)
    training, average, buffers = weights_of(model), clone(state.average()), buffers_of(state)
    with state.applied_to(model):
        model.double()
        assert_same({n: t.to(average[n].dtype) for n, t in state.average().items()}, average)
        back(model)
    model.float()
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)
    state.update(model, 4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_training_weights_come_back_to_a_16_bit_model_that_is_widened_inside(make_mlp, dtype):
    model = make_mlp(dtype=dtype)
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    with state.applied_to(model):
        model.float()
    assert_same(weights_of(model), {n: t.float() if t.is_floating_point() else t for n, t in training.items()})
    model.to(dtype)
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


def test_training_weights_come_back_rounded_to_a_model_that_is_narrowed_inside(make_mlp):
    """The model's dtype is the user's choice; what has gone through 16 bits cannot have more."""
    model = make_mlp()
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    with state.applied_to(model):
        model.bfloat16()
    assert_same(weights_of(model), {n: t.to(weights_of(model)[n].dtype) for n, t in training.items()})
    assert model[4].weight.dtype == torch.bfloat16
    for name, kept in buffers_of(state).items():
        for n, tensor in kept.items():
            torch.testing.assert_close(tensor, buffers[name][n], rtol=2**-8, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_training_weights_come_back_to_a_model_whose_tensors_were_replaced_inside(make_mlp, dtype):
    """As `load_state_dict(..., assign=True)` does, and a materialisation of parameters."""
    model = make_mlp(dtype=dtype)
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    with state.applied_to(model):
        former = dict(model.named_parameters())
        model.load_state_dict(weights_of(model), assign=True)
        assert all(model.get_parameter(n).data_ptr() != former[n].data_ptr() for n in former)
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


@pytest.mark.parametrize('replace', [lambda: torch.nn.Identity(), lambda: torch.nn.Linear(8, 2)])
def test_training_weights_wait_for_a_model_that_lacks_their_place(make_mlp, replace):
    """Swapping out of a model without a tensor, or with another shape of it, touches nothing and can be done later."""
    model = make_mlp()
    state = averaging(model)
    training, average, buffers = weights_of(model), clone(state.average()), buffers_of(state)
    state.swap_in(model)
    held, layer = weights_of(model), model[4]
    model[4] = replace()
    with pytest.raises(ValueError, match='average'):
        state.swap_out()
    assert state.swapped
    model[4] = layer
    assert_same(weights_of(model), held)
    assert_same(state.average(), average)
    state.swap_out()
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


@pytest.mark.parametrize('start', [False, True])
def test_before_the_first_update_the_training_weights_are_applied(make_mlp, start):
    """There is no average yet. What happens to the weights inside stays, since there is nothing to put back."""
    model = make_mlp()
    state = started(model) if start else make_state()
    move(model)
    training, saved = weights_of(model), saved_and_loaded(state.state_dict())
    with state.applied_to(model) as inside:
        assert inside is model
        assert not state.swapped
        assert_same(weights_of(model), training)
        move(model)
        moved = weights_of(model)
    assert_same(weights_of(model), moved)
    assert_same(state.state_dict(), saved)
    with pytest.raises(KeyError, match='inside'), state.applied_to(model):
        raise KeyError('inside')
    assert not state.swapped
    if start:
        state.update(model, 1)
        with state.applied_to(model):
            assert state.swapped
            assert differ(weights_of(model), moved)


@pytest.mark.parametrize(
    ('elapsed', 'error'), [(-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ('3', TypeError)]
)
def test_a_time_that_makes_no_coefficient_is_an_error(make_mlp, elapsed, error):
    """It would poison the average, or weigh it negatively, past any guard of the weights."""
    model = make_mlp()
    state = averaging(model)
    before = buffers_of(state)
    with pytest.raises(error, match='^elapsed must be'):
        state.update(model, 4, elapsed=elapsed)
    assert_same(buffers_of(state), before)
    assert state.num_updates == 3


def test_an_update_that_failed_halfway_is_remembered(make_mlp, monkeypatch, tmp_path):
    """Until the buffers are others: nobody goes on from half an update, or saves it."""
    model = make_mlp()
    state = averaging(model)
    saved = saved_and_loaded(state.state_dict())
    move(model)

    def fail(step, theta, buffers):
        apply_step(step, theta[:1], {name: tensors[:1] for name, tensors in buffers.items()})
        raise torch.OutOfMemoryError('no room for a chunk')

    monkeypatch.setattr(kernels, 'apply_step', fail)
    with pytest.raises(torch.OutOfMemoryError, match='^no room'):
        state.update(model, 4)
    monkeypatch.undo()
    for use in (lambda: state.update(model, 4), state.state_dict, state.average, lambda: state.swap_in(model)):
        with pytest.raises(RuntimeError, match='The last update failed.*OutOfMemoryError: no room for a chunk'):
            use()
    assert state.num_updates == 3
    state.load_state_dict(saved, model)
    assert_same(buffers_of(state), saved['buffers'])
    state.update(model, 4)


@pytest.mark.parametrize('call', ['start', 'update', 'swap_in', 'distance', 'load_state_dict'])
def test_a_state_dict_is_no_model(make_mlp, call):
    state = averaging(make_mlp())
    model = make_mlp().state_dict()
    arguments = {'update': (model, 4), 'load_state_dict': (state.state_dict(), model)}.get(call, (model,))
    with pytest.raises(TypeError, match=rf'^{call} needs a torch\.nn\.Module, but the model is a OrderedDict'):
        getattr(state, call)(*arguments)


def test_two_averages_of_one_model_do_not_average_each_other(make_mlp):
    model = make_mlp()
    state, other = averaging(model), averaging(model)
    training, buffers = weights_of(model), buffers_of(other)
    wrapped = torch.nn.Sequential(model)
    with state.applied_to(model):
        for use in (
            lambda: other.update(model, 4),
            lambda: other.swap_in(model),
            lambda: other.start(model),
            lambda: other.distance(model),
            lambda: make_state().start(wrapped),
        ):
            with pytest.raises(RuntimeError, match='needs the training weights in the model, but another average is'):
                use()
        make_state().start(make_mlp())
    assert_same(weights_of(model), training)
    assert_same(buffers_of(other), buffers)
    other.update(model, 4)


def test_an_average_that_is_gone_holds_nothing(make_mlp):
    model = make_mlp()
    state = averaging(model)
    state.swap_in(model)
    del state
    gc.collect()
    make_state().start(model)


def test_buffers_that_were_taken_in_inference_mode_can_be_written_to_outside_of_it(make_mlp):
    model = make_mlp()
    state = make_state()
    with torch.inference_mode():
        state.start(model)
    move(model)
    state.update(model, 1)
    with torch.inference_mode():
        state.load_state_dict(saved_and_loaded(state.state_dict()), model)
    state.update(model, 2)


@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor')  # torch 2.15 means to drop it.
@pytest.mark.parametrize(
    ('make_tensor', 'reason'),
    [
        (lambda: torch.ones(1).expand(5), 'is expanded, so that elements of it share memory'),
        (lambda: torch.eye(3).to_sparse(), r'is of the layout torch\.sparse_coo'),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), 'is quantized'),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), r'is torch\.float8_e4m3fn'),
    ],
)
def test_what_has_no_average_is_named_before_anything_is_averaged(make_mlp, make_tensor, reason):
    model, tensor = make_mlp(), make_tensor()
    model.register_buffer('strange', tensor)
    with pytest.raises(ValueError, match=f"^'strange' {reason}, of which there is no average: make it"):
        make_state().start(model)
    model.register_buffer('strange', tensor, persistent=False)
    make_state().start(model)


def test_a_buffer_that_is_only_copied_may_have_any_dtype(make_mlp):
    model = make_mlp()
    model.register_buffer('scales', torch.ones(3).to(torch.float8_e4m3fn))
    state = started(model, average_buffers=False)
    model.scales.copy_(torch.full((3,), 2.0))
    state.update(model, 1)
    with state.applied_to(model):
        assert model.scales.float().tolist() == [2.0] * 3


# ------------------------------------------------------------------------------------------------------- interruption


class InterruptedAt:
    """An exchange that is interrupted once, before its call of that number, and counts its calls."""

    def __init__(self, call: int) -> None:
        self.call = call
        self.calls = 0

    def __call__(self, left: Any, right: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        exchange(left, right)


exchange, apply_step = kernels.exchange, kernels.apply_step


@pytest.fixture
def one_by_one(monkeypatch):
    """Every tensor is exchanged on its own, as if it took a launch."""
    monkeypatch.setattr(kernels, 'exchange_groups', lambda left, right: [[i] for i in range(len(left))])


# The exchanges that a swap then makes: all of an fp32 model's, and of a bf16 one's its integer buffer and the like.
EXCHANGES = [('float32', 1), ('float32', 4), ('float32', 9), ('bfloat16', 1), ('mixed', 2), ('mixed', 5), ('tied', 3)]


@pytest.mark.parametrize('name', ['float32', 'tied'])
def test_a_swap_is_one_exchange(make_mlp, monkeypatch, name):
    """The threads that share it are started once, and nothing can come in between."""
    model = MODELS[name](make_mlp)
    state = averaging(model)
    counting = InterruptedAt(0)
    monkeypatch.setattr(kernels, 'exchange', counting)
    state.swap_in(model)
    assert counting.calls == 1
    state.swap_out()
    assert counting.calls == 2


def test_weights_that_share_memory_without_being_tied_are_exchanged_in_order():
    """And in reverse on the way out: the second name finds the first one's average where the weights were."""
    model = torch.nn.Module()
    memory = torch.arange(1000.0)
    model.first, model.second = torch.nn.Parameter(memory[:600]), torch.nn.Parameter(memory[400:])
    state = AverageState(ema_rule())
    state.start(model)
    state.update(model, 1)
    with torch.no_grad():
        memory.mul_(2)
    training, buffers = weights_of(model), buffers_of(state)
    state.swap_in(model)
    assert model.second.tolist() == list(range(400, 1000))
    assert model.first.tolist() == list(range(600))
    state.swap_out()
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


@pytest.mark.usefixtures('one_by_one')
@pytest.mark.parametrize(('name', 'call'), EXCHANGES)
def test_an_interrupted_swap_out_can_be_finished(make_mlp, monkeypatch, name, call):
    """A second ^C, or a signal: what is back is not exchanged again, and what is not back comes back, bit for bit."""
    model = MODELS[name](make_mlp)
    state = averaging(model)
    training, average, buffers = weights_of(model), clone(state.average()), buffers_of(state)
    state.swap_in(model)
    interrupted = InterruptedAt(call)
    monkeypatch.setattr(kernels, 'exchange', interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.swap_out()
    assert interrupted.calls == call
    assert state.swapped
    # Wherever each value is at the moment.
    assert_same({n: t.to(average[n].dtype) for n, t in state.average().items()}, average)
    with pytest.raises(RuntimeError, match='swap_in needs the training weights'):
        state.swap_in(model)
    state.swap_out()
    assert not state.swapped
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)
    state.swap_out()
    assert_same(weights_of(model), training)
    with state.applied_to(model):
        assert differ(weights_of(model), training)
    assert_same(weights_of(model), training)


@pytest.mark.usefixtures('one_by_one')
def test_a_swap_out_that_is_interrupted_again_and_again_can_be_finished(make_mlp, monkeypatch):
    model = make_mlp()
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    state.swap_in(model)
    exchanged = len(state.average())
    for _ in range(exchanged):
        # One tensor comes back each time.
        monkeypatch.setattr(kernels, 'exchange', InterruptedAt(2))
        try:
            state.swap_out()
        except KeyboardInterrupt:
            assert state.swapped
    assert not state.swapped
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


@pytest.mark.usefixtures('one_by_one')
@pytest.mark.parametrize(('name', 'call'), EXCHANGES)
def test_an_interrupted_swap_in_is_undone(make_mlp, monkeypatch, name, call):
    model = MODELS[name](make_mlp)
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    monkeypatch.setattr(kernels, 'exchange', InterruptedAt(call))
    with pytest.raises(KeyboardInterrupt):
        state.swap_in(model)
    assert not state.swapped
    assert_same(weights_of(model), training)
    assert_same(buffers_of(state), buffers)


@pytest.mark.usefixtures('one_by_one')
@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'mixed'])
def test_a_state_saved_after_an_interrupted_swap_out_loses_nothing(make_mlp, monkeypatch, name):
    """The emergency checkpoint of a run that was stopped while it swapped: half of the model holds the average."""
    model = MODELS[name](make_mlp)
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    state.swap_in(model)
    monkeypatch.setattr(kernels, 'exchange', InterruptedAt(1 if name == 'bfloat16' else 3))
    with pytest.raises(KeyboardInterrupt):
        state.swap_out()
    file = saved_and_loaded({'model': model.state_dict(), 'state': state.state_dict()})
    other = MODELS[name](make_mlp)
    other.load_state_dict(file['model'])
    resumed = make_state()
    resumed.load_state_dict(file['state'], other)
    assert_same(weights_of(other), training)
    assert_same(buffers_of(resumed), buffers)


class FailingAt(TorchDispatchMode):
    """Lets the operation of that number find no memory."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise MemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'mixed'])
@pytest.mark.usefixtures('by_torch_alone')
def test_a_swap_of_which_any_operation_fails_loses_nothing(make_mlp, name):
    """On the way in all is as it was; on the way out a second try ends it.

    Not of a compiled exchange, which has no operation that could find no memory.
    """
    model = MODELS[name](make_mlp)
    state = averaging(model)
    training, buffers = weights_of(model), buffers_of(state)
    failures = {state.swap_in: 0, state.swap_out: 0}
    for number in itertools.count(1):
        try:
            with FailingAt(number):
                state.swap_in(model)
        except MemoryError:
            failures[state.swap_in] += 1
            assert not state.swapped
            assert_same(weights_of(model), training)
            assert_same(buffers_of(state), buffers)
            state.swap_in(model)
        try:
            with FailingAt(number):
                state.swap_out()
        except MemoryError:
            failures[state.swap_out] += 1
            state.swap_out()
        assert not state.swapped
        assert_same(weights_of(model), training)
        assert_same(buffers_of(state), buffers)
        if max(failures.values()) < number - 1:
            break
    assert min(failures.values()) > 10


# ----------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize('swapped', [False, True])
@pytest.mark.parametrize('name', [name for name in MODELS if name != 'complex64'])
def test_a_state_travels_through_a_plain_file(make_mlp, name, swapped):
    """Tensors, numbers and strings, which `weights_only=True` reads; the reader goes on where the writer stood."""
    model = MODELS[name](make_mlp)
    state = averaging(model)
    state.num_skipped = 2
    training, buffers = weights_of(model), buffers_of(state)
    if swapped:
        state.swap_in(model)
    file = saved_and_loaded({'model': model.state_dict(), 'state': state.state_dict()})
    assert file['state']['model_holds'] == ('average' if swapped else 'training')
    assert ('training_weights' in file['state']) == swapped
    other = MODELS[name](make_mlp)
    move(other)
    other.load_state_dict(file['model'])
    resumed = make_state()
    resumed.load_state_dict(file['state'], other)
    assert (resumed.num_updates, resumed.num_skipped, resumed.swapped) == (3, 2, False)
    assert_same(weights_of(other), training)
    assert_same(buffers_of(resumed), buffers)
    with resumed.applied_to(other):
        assert differ(weights_of(other), training)
    assert_same(weights_of(other), training)


def test_a_file_written_while_swapped_holds_the_average_once(make_mlp):
    """The state leaves out what the model holds: a swapped file is no larger than an unswapped one."""
    model = make_mlp()
    state = averaging(model)
    sizes = []
    for swap in (lambda: None, lambda: state.swap_in(model)):
        swap()
        file = saved_and_loaded({'model': model.state_dict(), 'state': state.state_dict()})
        tensors = [*file['model'].values(), *file['state'].get('training_weights', {}).values()]
        tensors += [t for kept in file['state']['buffers'].values() for t in kept.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        sizes.append(sum(storages.values()))
    assert sizes[0] == sizes[1]
    assert '4.weight' not in file['state']['buffers']['bema']


def test_a_state_dict_copies_nothing(make_mlp):
    state = averaging(make_mlp())
    saved = state.state_dict()['buffers']['bema']
    assert {n: saved[n].data_ptr() for n in saved} == {n: state.average()[n].data_ptr() for n in saved}


def test_what_was_loaded_is_a_copy(make_mlp):
    model = make_mlp()
    saved = averaging(model).state_dict()
    state = make_state()
    state.load_state_dict(saved, model)
    loaded = buffers_of(state)
    for tensors in saved['buffers'].values():
        for tensor in tensors.values():
            tensor.zero_()
    assert_same(buffers_of(state), loaded)


@pytest.mark.parametrize('swapped', [False, True])
@pytest.mark.parametrize('wrap_back', [lambda model: model, ddp, compiled, lambda model: ddp(compiled(model))])
@pytest.mark.parametrize('wrap', [lambda model: model, lambda model: compiled(ddp(model))])
def test_a_state_saved_under_any_wrapping_loads_under_any_other(make_mlp, wrap, wrap_back, swapped):
    model = make_mlp()
    wrapped = wrap(model)
    state = averaging(wrapped)
    training, buffers = weights_of(model), buffers_of(state)
    if swapped:
        state.swap_in(wrapped)
    other = make_mlp(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = make_state()
    resumed.load_state_dict(saved_and_loaded(state.state_dict()), wrap_back(other))
    assert_same(buffers_of(resumed), buffers)
    assert_same(weights_of(other), training)


def test_a_state_that_has_not_started_can_be_saved(make_mlp):
    state = averaging(make_mlp())
    state.load_state_dict(saved_and_loaded(make_state().state_dict()), make_mlp())
    assert not state.started
    assert state.num_updates == 0


def test_an_average_goes_on_after_loading_as_if_never_saved(make_mlp):
    """The control: with one more update, the buffers differ."""
    model = make_mlp(dtype=torch.bfloat16)
    state = averaging(model)
    resumed = make_state()
    resumed.load_state_dict(saved_and_loaded(state.state_dict()), model)
    for step in (4, 5):
        move(model)
        for one in (state, resumed):
            one.update(model, step)
    assert_same(buffers_of(resumed), buffers_of(state))
    resumed.update(model, 6)
    assert differ(buffers_of(resumed)['ema'], buffers_of(state)['ema'])


def test_another_dtype_of_model_takes_the_average(make_mlp):
    """From fp32 to bf16 the average keeps its digits, and a theta_0 kept in bf16 stays so."""
    state = averaging(make_mlp())
    saved = saved_and_loaded(state.state_dict())
    resumed = make_state()
    resumed.load_state_dict(saved, make_mlp(dtype=torch.bfloat16))
    assert_same(buffers_of(resumed), buffers_of(state))
    wider = make_state()
    wider.load_state_dict(saved, make_mlp(dtype=torch.float64))
    assert wider.average()['4.weight'].dtype == torch.float64


@pytest.mark.parametrize(('saved_with', 'loaded_with'), [(True, False), (False, True)])
def test_module_buffers_load_across_a_change_of_how_they_are_kept(make_mlp, saved_with, loaded_with):
    model = make_mlp()
    state = averaging(model, average_buffers=saved_with)
    resumed = make_state(average_buffers=loaded_with)
    resumed.load_state_dict(saved_and_loaded(state.state_dict()), model)
    assert_same(resumed.average(), state.average())
    mean = resumed.average()['1.running_mean'].clone()
    model[1].running_mean.add_(8.0)
    now = model[1].running_mean.clone()
    resumed.update(model, 4)
    expected = 0.75 * mean + 0.25 * now if loaded_with else now
    torch.testing.assert_close(resumed.average()['1.running_mean'], expected, rtol=0, atol=1e-5)


def test_a_bema_state_loads_under_an_ema_of_the_same_weights(make_mlp):
    """What the rule needs is there; that it needs less is no error."""
    model = make_mlp()
    state = averaging(model)
    ema = AverageState(EMA(ConstantDecay(BETA)))
    ema.load_state_dict(state.state_dict(), model)
    assert_same(ema.state_dict()['buffers']['ema'], state.state_dict()['buffers']['ema'])


def edited(state: AverageState, edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    saved = saved_and_loaded(state.state_dict())
    edit(saved)
    return saved


def saved_elsewhere(state: AverageState, edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """What another model's state would be: its digests are those of its tensors."""
    saved = edited(state, edit)
    saved['digests'] = digests_of({**saved['buffers'], 'training_weights': saved.get('training_weights', {})})
    return saved


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda saved: saved['buffers']['ema'].pop('4.weight'), "no tensor '4.weight', which the model has"),
        (lambda saved: saved['buffers']['ema'].pop('1.running_var'), "no tensor '1.running_var', which the model has"),
        (
            lambda saved: [b.pop('4.weight') for b in saved['buffers'].values() if '4.weight' in b],
            r"^The saved average has no tensor '4\.weight', which the model trains\.$",
        ),
        (
            lambda saved: saved['buffers']['bema'].update({'5.weight': torch.zeros(2)}),
            "'5.weight' that the model lacks",
        ),
        (
            lambda saved: saved['buffers']['theta_0'].update({'4.bias': torch.zeros(4)}),
            r"average of '4.bias' has the shape \(4,\), but the model's has \(3,\)",
        ),
        (lambda saved: saved['buffers'].pop('theta_0'), r"no buffer 'theta_0'.*\['bema', 'ema', 'latest'\]"),
        (
            lambda saved: saved.update(model_holds='average', training_weights={'4.bias': torch.zeros(9)}),
            r"'4.bias' has the shape \(9,\), but the model's has \(3,\)",
        ),
        (
            lambda saved: saved.update(model_holds='average', training_weights={'9.bias': torch.zeros(9)}),
            "'9.bias' that the model lacks",
        ),
    ],
)
def test_a_state_of_another_model_is_an_error_that_changes_nothing(make_mlp, edit, message):
    model = make_mlp()
    saved = saved_elsewhere(averaging(model), edit)
    state = averaging(model, updates=1)
    before = weights_of(model), buffers_of(state), state.num_updates
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(saved, model)
    assert_same(weights_of(model), before[0])
    assert_same(buffers_of(state), before[1])
    assert state.num_updates == before[2]


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda saved: saved['buffers']['ema']['4.weight'].view(-1)[3].neg_(), "values of '4.weight' in 'ema' are not"),
        (lambda saved: saved['buffers']['latest']['1.num_batches_tracked'].add_(1), "'1.num_batches_tracked' in 'lat"),
        (lambda saved: saved['buffers']['theta_0'].pop('4.weight'), "lacks the values of '4.weight' in 'theta_0'"),
        (lambda saved: saved['digests']['ema'].pop('4.weight'), "values of '4.weight' in 'ema' are not"),
        (lambda saved: saved['digests'].pop('theta_0'), "in 'theta_0' are not"),
    ],
)
def test_a_damaged_state_is_an_error_that_changes_nothing(make_mlp, edit, message):
    model = make_mlp()
    saved = edited(averaging(model), edit)
    state = averaging(model, updates=1)
    before = buffers_of(state)
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(saved, model)
    assert_same(buffers_of(state), before)


def test_another_model_than_the_one_saved_while_swapped_is_an_error(make_mlp):
    """What the state leaves out is the model's, which has to be the one that was saved."""
    model = make_mlp()
    state = averaging(model)
    with state.applied_to(model):
        saved = saved_and_loaded(state.state_dict())
    with pytest.raises(ValueError, match="ema' are not those that were saved.*the model does not hold the weights"):
        make_state().load_state_dict(saved, make_mlp(seed=5))


@pytest.mark.parametrize('key', ['buffers', 'digests', 'model_holds', 'num_updates', 'num_skipped'])
def test_a_state_that_lacks_an_entry_changes_nothing(make_mlp, key):
    model = make_mlp()
    saved = edited(averaging(model), lambda saved: saved.pop(key))
    state = averaging(model, updates=1)
    before = buffers_of(state), state.num_updates
    with pytest.raises((KeyError, ValueError), match=key):
        state.load_state_dict(saved, model)
    assert_same(buffers_of(state), before[0])
    assert state.num_updates == before[1]


def test_a_parameter_that_became_trainable_before_loading_is_an_error(make_mlp):
    model = make_mlp()
    state = averaging(model)
    model[3].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^The saved average has no tensor '3\.bias', which the model trains\.$"):
        make_state().load_state_dict(state.state_dict(), model)


def test_an_average_loads_into_a_model_that_trains_nothing_any_more(make_mlp):
    """As a model that was loaded for an evaluation."""
    model = make_mlp()
    state = averaging(model)
    frozen = make_mlp(seed=1).requires_grad_(False)
    resumed = make_state()
    resumed.load_state_dict(saved_and_loaded(state.state_dict()), frozen)
    assert_same(buffers_of(resumed), buffers_of(state))
    resumed.copy_to(frozen)
    average = state.average()
    assert_same({n: weights_of(frozen)[n] for n in average}, average)


# ------------------------------------------------------------------------------------- the average in other models


@pytest.mark.parametrize('swapped', [False, True])
@pytest.mark.parametrize('wrap', [lambda model: model, ddp, compiled])
@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'tied', 'mixed'])
def test_an_averaged_state_dict_loads_strictly_into_a_bare_model(make_mlp, name, wrap, swapped):
    """Every entry of the state dict is there, tied ones under each of their names, in the model's dtypes."""
    model = MODELS[name](make_mlp)
    state = averaging(model)
    average, keys = clone(state.average()), list(model.state_dict())
    if swapped:
        state.swap_in(model)
    averaged = state.averaged_state_dict(wrap(model))
    assert list(averaged) == keys
    fresh = MODELS[name](make_mlp)
    fresh.load_state_dict(averaged, strict=True)
    loaded = weights_of(fresh)
    assert_same({n: loaded[n] for n in average}, {n: t.to(loaded[n].dtype) for n, t in average.items()})


def test_an_averaged_state_dict_is_a_copy(make_mlp):
    model = make_mlp()
    state = averaging(model)
    before = weights_of(model), buffers_of(state)
    for tensor in state.averaged_state_dict(model).values():
        tensor.zero_()
    assert_same(weights_of(model), before[0])
    assert_same(buffers_of(state), before[1])


def test_a_tied_weight_is_averaged_under_each_of_its_names():
    model = Tied()
    state = averaging(model)
    averaged = state.averaged_state_dict(model)
    assert bits(averaged['head.weight']) == bits(averaged['embedding.weight'])
    assert bits(averaged['head.weight']) == bits(state.average()['embedding.weight'])
    assert bits(averaged['head.weight']) != bits(model.head.weight)


def test_the_statistics_of_a_shared_module_are_averaged_under_each_of_their_names():
    shared = torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    state = averaging(model)
    averaged = state.averaged_state_dict(model)
    assert bits(averaged['0.running_mean']) == bits(state.average()['0.running_mean'])
    assert bits(averaged['2.running_mean']) == bits(averaged['0.running_mean'])
    assert bits(averaged['2.running_mean']) != bits(shared.running_mean)


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_copy_rounds_once_to_the_other_models_dtype(make_mlp, dtype):
    model = make_mlp()
    state = averaging(model)
    average, training = clone(state.average()), weights_of(model)
    other = make_mlp(seed=1, dtype=dtype)
    frozen = bits(other[3].weight)
    state.copy_to(other)
    copied = weights_of(other)
    assert_same({n: copied[n] for n in average}, {n: t.to(copied[n].dtype) for n, t in average.items()})
    assert bits(other[3].weight) == frozen
    assert_same(weights_of(model), training)
    assert_same(state.average(), average)


def test_a_copy_to_a_model_of_another_shape_is_an_error_that_touches_nothing(make_mlp):
    state = averaging(make_mlp())
    other = make_mlp(seed=1)
    other[4] = torch.nn.Linear(8, 2)
    before = weights_of(other)
    with pytest.raises(ValueError, match=r"'4.weight' has the shape \(3, 8\), but the model's has \(2, 8\)"):
        state.copy_to(other)
    assert_same(weights_of(other), before)


def test_a_copied_model_can_take_the_original_ones_place(make_mlp):
    """Names, not objects, tie a state to a model."""
    model = make_mlp()
    state = averaging(model)
    average, training = clone(state.average()), weights_of(model)
    twin = copy.deepcopy(model)
    with state.applied_to(twin):
        assert_same({n: weights_of(twin)[n] for n in average}, average)
        assert_same(weights_of(model), training)
    assert_same(weights_of(twin), training)
    move(twin)
    state.update(twin, 4)
    assert_same(weights_of(model), training)


def test_the_distance_is_that_of_the_parameters(make_mlp):
    model = make_mlp()
    state = started(model)
    assert state.distance(model) == 0
    with torch.no_grad():
        model[0].bias[0] += 3
        model[4].bias[1] += 4
        model[1].running_mean += 100
    assert state.distance(model) == pytest.approx(5, rel=1e-6)


# ------------------------------------------------------------------------------------------------ distributed tensors


@pytest.mark.usefixtures('one_rank')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_sharded_model_is_averaged_shard_by_shard(dtype):
    """The same numbers as of the whole model, from local tensors, through update, swap, save and the guard."""
    mesh = init_device_mesh('cpu', (1,))
    whole = torch.nn.Linear(4, 6).to(dtype)
    sharded = copy.deepcopy(whole)
    for name, parameter in list(sharded.named_parameters()):
        values = distribute_tensor(parameter.data.clone(), mesh, [Shard(0)])
        setattr(sharded, name, torch.nn.Parameter(values))
    states = started(whole), started(sharded)
    for step in (1, 2):
        move(whole)
        with torch.no_grad():
            for name, parameter in sharded.named_parameters():
                assert isinstance(parameter, DTensor)
                parameter.to_local().copy_(whole.get_parameter(name))
        for state, model in zip(states, (whole, sharded), strict=True):
            state.update(model, step)
    assert_same(buffers_of(states[1]), buffers_of(states[0]))
    assert not any(isinstance(t, DTensor) for t in states[1].average().values())
    with states[1].applied_to(sharded), states[0].applied_to(whole):
        for name, parameter in sharded.named_parameters():
            assert bits(parameter.to_local()) == bits(whole.get_parameter(name))
    resumed = make_state()
    resumed.load_state_dict(states[1].state_dict(), sharded)
    assert_same(buffers_of(resumed), buffers_of(states[0]))
    resumed.load_state_dict(saved_and_loaded(states[0].state_dict()), sharded)
    assert_same(buffers_of(resumed), buffers_of(states[0]))
    assert_same(states[1].averaged_state_dict(sharded), states[0].averaged_state_dict(whole))
    with torch.no_grad():
        sharded.bias.to_local()[5] = math.nan
    with pytest.raises(FloatingPointError, match="'bias' holds a NaN"):
        states[1].update(sharded, 3)


def test_a_verdict_of_another_rank_is_heeded(make_mlp, monkeypatch):
    """All ranks decide alike, though only one of them saw the bad weight."""
    model = make_mlp()
    state = averaging(model)
    before = buffers_of(state)

    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr('composer_bema.averaging.state.sum_over_ranks', lambda votes, device: [votes[0] + 1])
    with pytest.raises(FloatingPointError, match='After step 4 a parameter on another rank holds a NaN'):
        state.update(model, 4)
    assert_same(buffers_of(state), before)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_average_in_host_memory_follows_a_model_on_an_accelerator(make_mlp, dtype):
    model = make_mlp(dtype=dtype).cuda()
    state = averaging(model, device='cpu')
    assert {t.device.type for t in state.average().values()} == {'cpu'}
    assert state.average()['4.weight'].is_pinned()
    training = weights_of(model.cpu())
    model.cuda()
    with state.applied_to(model):
        assert bits(model[4].weight.cpu()) == bits(state.average()['4.weight'].to(dtype))
    assert_same(weights_of(model.cpu()), training)


def test_the_rules_of_the_package_drive_a_state(make_mlp):
    """With `bias_power=None` BEMA is the EMA, buffers and all."""
    model = make_mlp()
    states = [AverageState(rule) for rule in (bema_rule(bias_power=None), ema_rule())]
    for state in states:
        state.start(model)
    move(model)
    for state in states:
        state.update(model, 400)
    assert_same(states[0].state_dict(), states[1].state_dict())
    assert 'theta_0' not in states[0].state_dict()['buffers']
