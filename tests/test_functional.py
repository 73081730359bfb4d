# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The functions for hand-written loops compute what the published implementations compute, step for step."""

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from composer_bema import functional as cf

TRAINABLE = ('a', 'b', 'c')


class Trajectory(torch.nn.Module):
    """Holds the golden weights of any step. The frozen parameter comes first: pairing by position goes wrong there."""

    def __init__(self, arrays: Mapping[str, np.ndarray], step: int = 0) -> None:
        super().__init__()
        self.arrays = arrays
        self.f = torch.nn.Parameter(self.at('f', 0), requires_grad=False)
        for name in TRAINABLE:
            self.register_parameter(name, torch.nn.Parameter(self.at(name, step)))
        self.register_buffer('r', self.at('r', step))

    def at(self, name: str, step: int) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name][step].copy())

    @torch.no_grad()
    def go_to(self, step: int) -> None:
        """Does what an optimizer step does to the weights, and a forward pass to the module buffer."""
        for name in (*TRAINABLE, 'r'):
            getattr(self, name).copy_(self.at(name, step))


@pytest.fixture
def trajectory(golden) -> Trajectory:
    return Trajectory(golden('trajectory').arrays)


def follow(model: Trajectory, state: cf.LoopState, names: tuple[str, ...] = TRAINABLE) -> dict[int, dict[str, Any]]:
    """The buffers and coefficients after each update along the trajectory, by step."""
    seen = {}
    for step in range(1, 61):
        model.go_to(step)
        updated = cf.compute_bema(model, state)
        assert isinstance(updated, bool)
        if not updated:
            continue
        coefficients = state.rule.linear_step(step, state.update_freq, 0).coefficients
        buffers = state.state_dict()['buffers']
        average = state.average()
        seen[step] = {
            'coefficients': coefficients,
            'average': {name: average[name].numpy().copy() for name in names},
            'ema': {name: buffers['ema'][name].numpy().copy() for name in TRAINABLE},
            'theta_0': {name: t.numpy().copy() for name, t in buffers.get('theta_0', {}).items()},
        }
    return seen


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 5e-6) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_bits(one: Any, other: Any) -> None:
    """Asserts that two nested dicts of tensors and numbers agree, tensors bit for bit."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.numpy().tobytes() == other.numpy().tobytes()
    else:
        assert one == other


# ------------------------------------------------------------------------------------------------------------ golden


# t13 is left out: with lag 0 and multiplier 0.25 TRL's first beta is 2, and ours never exceeds 1. TRL never updates
# module buffers, so `r` is not compared.
@pytest.mark.parametrize('id', [*(f't{i:02}' for i in range(17) if i != 13), 'ref00'])
def test_bema_is_that_of_trl(golden, trajectory, id):
    """Updates at the same steps with the same coefficients, and the same theta_0, EMA and BEMA after each."""
    trl = golden('trl')
    arrays = trl.of(id)
    settings = {
        key: trl.configs[id]['kwargs'][key]
        for key in (
            'update_freq',
            'update_after',
            'ema_power',
            'bias_power',
            'lag',
            'multiplier',
            'min_ema_multiplier',
            'device',
        )
    }
    seen = follow(trajectory, cf.init_bema(trajectory, **settings))
    assert list(seen) == arrays['updates'].tolist()
    for row, ours in enumerate(seen.values()):
        assert ours['coefficients']['alpha'] == pytest.approx(arrays['alpha'][row], rel=0, abs=1e-12)
        assert ours['coefficients']['beta'] == pytest.approx(arrays['beta'][row], rel=0, abs=1e-12)
        for name in TRAINABLE:
            assert_close(ours['average'][name], arrays[f'running/{name}'][row])
            assert_close(ours['ema'][name], arrays[f'ema/{name}'][row])
            assert_close(ours['theta_0'][name], arrays[f'theta0/{name}'][0], tolerance=0)


def test_a_coefficient_never_exceeds_one_where_trls_does(golden, trajectory):
    """TRL's t13 starts with beta 2 and 1.41, which is no average; from step 4 on both agree."""
    trl = golden('trl')
    settings = trl.configs['t13']['kwargs']
    state = cf.init_bema(trajectory, update_freq=1, lag=settings['lag'], multiplier=settings['multiplier'])
    betas = [ours['coefficients']['beta'] for ours in follow(trajectory, state).values()]
    assert trl.of('t13')['beta'][:3].tolist() == pytest.approx([2, 2**0.5, (4 / 3) ** 0.5])
    assert betas[:4] == [1, 1, 1, 1]
    assert betas[4:] == pytest.approx(trl.of('t13')['beta'][4:].tolist(), rel=0, abs=1e-12)


@pytest.mark.parametrize('id', [f'{kind}{i:02}' for kind in ('module', 'params') for i in range(4)])
def test_an_ema_with_a_smoothing_is_composers_function(golden, trajectory, id):
    """`compute_ema` from the weights before the first step; module buffers are averaged too."""
    ema = golden('composer_ema')
    arrays, config = ema.of(id), ema.configs[id]
    state = cf.init_ema(trajectory, smoothing=config['kwargs']['smoothing'], update_freq=config['every'])
    seen = follow(trajectory, state, names=(*TRAINABLE, 'r'))
    assert list(seen) == arrays['updates'].tolist()
    for row, ours in enumerate(seen.values()):
        for name, average in ours['average'].items():
            assert_close(average, arrays[f'avg/{name}'][row])


# Composer starts from the weights after the first step (ours: update_after 1), at which it also updates if the interval
# divides it, to no effect. Left out are alg01, alg03, alg04, alg05 and alg07: their interval does not divide the step
# at which they start, and Composer updates at absolute multiples of it, ours at tau + k phi.
@pytest.mark.parametrize(
    ('id', 'update_after', 'update_freq'),
    [
        ('alg00', 1, 1),
        ('alg02', 1, 1),
        ('alg06', 1, 1),
        ('alg08', '7ba', 1),
        ('alg09', 15, '5ba'),
        ('alg10', '1ba', None),
    ],
)
def test_an_ema_is_composers_algorithm_where_it_starts_on_its_grid(golden, trajectory, id, update_after, update_freq):
    ema = golden('composer_ema')
    arrays, settings = ema.of(id), ema.configs[id]['kwargs']
    half_life = None if settings['half_life'] is None else float(settings['half_life'].removesuffix('ba'))
    state = cf.init_ema(
        trajectory,
        half_life=half_life,
        smoothing=settings['smoothing'],
        update_after=update_after,
        update_freq=update_freq,
    )
    seen = follow(trajectory, state, names=(*TRAINABLE, 'r'))
    started = arrays['started'].item()
    theirs = arrays['updates'].tolist()
    assert theirs[0] == started == state.update_after
    assert list(seen) == theirs[1:]
    for name in (*TRAINABLE, 'r'):
        assert_close(trajectory.arrays[name][started], arrays[f'avg/{name}'][0])
    for row, (_, ours) in enumerate(seen.items(), start=1):
        for name, average in ours['average'].items():
            assert_close(average, arrays[f'avg/{name}'][row])
        assert ours['coefficients']['beta'] == pytest.approx(1 - arrays['smoothing'].item(), rel=0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- small updates


def test_small_updates_of_bf16_weights_are_not_lost():
    """With beta 0.003 an update is below bf16's 8 bits: only a wider accumulator follows. The control is a bf16 one."""
    beta, ramp = 0.003, torch.linspace(1, 2, 600)
    model = torch.nn.Linear(8, 8, bias=False).bfloat16()
    noise = 0.05 * torch.randn(600, 8, 8)
    with torch.no_grad():
        model.weight.fill_(1)
    state = cf.init_ema(model, smoothing=1 - beta)
    exact, narrow = model.weight.detach().double(), model.weight.detach().clone()
    for level, jitter in zip(ramp, noise, strict=True):
        with torch.no_grad():
            model.weight.copy_(level + jitter)
        cf.compute_ema(model, state)
        exact += beta * (model.weight.detach().double() - exact)
        narrow.lerp_(model.weight.detach(), beta)
    error = (state.average()['weight'].double() - exact).abs().max().item()
    error_of_control = (narrow.double() - exact).abs().max().item()
    assert error < 1e-5
    assert error_of_control > 1e-1


def test_bema_of_bf16_weights_keeps_its_digits():
    """At step 100000 beta is 0.003; the average stays within 1e-3 of float64, and a bf16 one does not."""
    model = torch.nn.Linear(8, 8, bias=False).bfloat16()
    state = cf.init_bema(model, update_freq=1)
    state.step = 100_000
    theta_0 = model.weight.detach().double()
    exact, narrow = theta_0.clone(), model.weight.detach().clone()
    for step in range(100_001, 100_301):
        with torch.no_grad():
            model.weight.copy_(theta_0 + 1 + 0.05 * torch.randn(8, 8))
        assert cf.compute_bema(model, state)
        beta = (10 + step) ** -0.5
        assert beta == pytest.approx(0.003, abs=2e-4)
        exact += beta * (model.weight.detach().double() - exact)
        narrow.lerp_(model.weight.detach(), beta)
    alpha = (10 + step) ** -0.2
    correction = alpha * (model.weight.detach().double() - theta_0)
    torch.testing.assert_close(state.average()['weight'].double(), exact + correction, rtol=0, atol=1e-3)
    assert (narrow.double() - exact).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------- steps


def run(state: cf.LoopState, model: torch.nn.Module, steps: int) -> list[int]:
    """The steps at which the average was updated."""
    return [step for step in range(state.step + 1, state.step + steps + 1) if cf.compute_bema(model, state)]


@pytest.mark.parametrize(
    ('update_freq', 'update_after', 'updates'),
    [
        (1, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (4, 0, [4, 8, 12]),
        ('4ba', '0ba', [4, 8, 12]),
        ('4', '0', [4, 8, 12]),
        # An update every phi after tau, and none at tau itself.
        (4, 1, [5, 9]),
        (5, 7, [12]),
        (1, '10ba', [11, 12]),
        (1, 12, []),
        (1, 20, []),
        (400, 0, []),
        (np.int64(6), np.int32(0), [6, 12]),
    ],
)
def test_updates_come_every_phi_after_tau(update_freq, update_after, updates):
    model = torch.nn.Linear(2, 2)
    state = cf.init_bema(model, update_freq=update_freq, update_after=update_after)
    assert run(state, model, 12) == updates
    assert (state.step, state.num_updates) == (12, len(updates))


def test_theta_0_is_the_weights_at_tau():
    model = torch.nn.Linear(1, 1, bias=False)
    state = cf.init_bema(model, update_after=3, update_freq=2, bias_power=0.0, ema_power=0.0)
    for step in range(1, 6):
        assert state.started == (step > 3)
        with torch.no_grad():
            model.weight.fill_(step)
        cf.compute_bema(model, state)
    buffers = state.state_dict()['buffers']
    # With both coefficients 1: EMA = theta_5 = 5, and BEMA = 5 + (5 - 3).
    assert [buffers[name]['weight'].item() for name in ('theta_0', 'ema', 'bema')] == [3, 5, 7]


def test_t_counts_from_the_start_of_the_run_and_not_from_tau():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0)
    state = cf.init_ema(model, update_after=4, update_freq=2)
    run(state, model, 5)
    with torch.no_grad():
        model.weight.fill_(1)
    assert run(state, model, 1) == [6]
    assert state.average()['weight'].item() == pytest.approx((10 + 6) ** -0.5)


@pytest.mark.parametrize(
    ('setting', 'value', 'at_least'),
    [
        ('update_freq', 0, 1),
        ('update_freq', '0ba', 1),
        ('update_freq', -1, 1),
        ('update_freq', 2.5, 1),
        ('update_freq', 400.0, 1),
        ('update_freq', '1ep', 1),
        ('update_freq', '0.1dur', 1),
        ('update_freq', 'ba', 1),
        ('update_freq', '', 1),
        ('update_freq', ' 4ba', 1),
        ('update_freq', '4ba\n', 1),
        ('update_freq', True, 1),
        ('update_after', -1, 0),
        ('update_after', '-1ba', 0),
        ('update_after', '1tok', 0),
        ('update_after', None, 0),
        ('update_after', False, 0),
        ('update_after', math.nan, 0),
    ],
)
@pytest.mark.parametrize('init', [cf.init_bema, cf.init_ema])
def test_a_bad_number_of_steps_is_named(init, setting, value, at_least):
    message = f"{setting} must be a number of steps of at least {at_least}, such as 400 or '400ba', but is "
    with pytest.raises(ValueError, match=message) as error:
        init(torch.nn.Linear(1, 1), **{setting: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ('init', 'settings', 'update_freq'),
    [
        (cf.init_bema, {}, 400),
        (cf.init_bema, {'half_life': 10}, 1),
        (cf.init_bema, {'half_life': 10, 'update_freq': 5}, 5),
        (cf.init_ema, {}, 400),
        (cf.init_ema, {'half_life': 10}, 1),
        (cf.init_ema, {'smoothing': 0.9}, 1),
        (cf.init_ema, {'smoothing': 0.0}, 1),
        (cf.init_ema, {'smoothing': 0.9, 'update_freq': '7ba'}, 7),
    ],
)
def test_a_constant_rate_updates_every_step_unless_told_otherwise(init, settings, update_freq):
    state = init(torch.nn.Linear(1, 1), **settings)
    assert (state.update_freq, state.update_after) == (update_freq, 0)


@pytest.mark.parametrize('update_freq', [1, 5])
def test_a_half_life_is_one_of_steps_whatever_the_update_frequency(update_freq):
    """From 1, along weights of 0, half is left after 10 steps; a given smoothing counts updates instead."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1)
    by_steps = cf.init_ema(model, half_life=10.0, update_freq=update_freq)
    by_updates = cf.init_ema(model, smoothing=0.5, update_freq=update_freq)
    with torch.no_grad():
        model.weight.fill_(0)
    run(by_steps, model, 10)
    run(by_updates, model, 10)
    assert by_steps.average()['weight'].item() == pytest.approx(0.5, abs=1e-6)
    assert by_updates.average()['weight'].item() == pytest.approx(0.5 ** (10 / update_freq), abs=1e-6)


@pytest.mark.parametrize('initialise', [cf.init_bema, cf.init_ema, cf.init_dema, cf.init_ouema])
def test_a_half_life_may_be_written_as_batches(initialise):
    model = torch.nn.Linear(1, 1)
    assert initialise(model, half_life='10ba').rule == initialise(model, half_life=10).rule


@pytest.mark.parametrize('resumed_at', [None, 4, 5, 6])
def test_a_half_life_counts_the_steps_of_a_skipped_update(resumed_at):
    """Time goes on while an update is left out, a resumption just then included: half is left after 10 steps."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1)
    state = cf.init_ema(model, half_life=10.0, nonfinite='skip')
    for step in range(1, 11):
        with torch.no_grad():
            model.weight.fill_(math.nan if step == 5 else 0)
        assert cf.compute_ema(model, state) == (step != 5)
        if step == resumed_at:
            saved = saved_and_loaded(state.state_dict())
            state = cf.init_ema(model, half_life=10.0, nonfinite='skip')
            state.load_state_dict(saved, model)
    assert state.average()['weight'].item() == pytest.approx(0.5, abs=1e-6)


def test_half_life_and_smoothing_exclude_each_other():
    with pytest.raises(ValueError, match='half_life and smoothing both fix the rate of the EMA'):
        cf.init_ema(torch.nn.Linear(1, 1), half_life=10, smoothing=0.9)


# ------------------------------------------------------------------------------------------------- arguments handed on


def test_a_skipped_update_returns_false():
    model = torch.nn.Linear(1, 1)
    state = cf.init_bema(model, update_freq=1, nonfinite='skip')
    with torch.no_grad():
        model.weight.fill_(math.inf)
    assert cf.compute_bema(model, state) is False
    assert (state.step, state.num_updates, state.num_skipped) == (1, 0, 1)


def test_a_nonfinite_weight_is_an_error_that_names_the_step():
    model = torch.nn.Linear(1, 1)
    state = cf.init_ema(model, update_freq=3)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    assert not cf.compute_ema(model, state)
    assert not cf.compute_ema(model, state)
    with pytest.raises(FloatingPointError, match="After step 3 'weight' holds a NaN or an infinity"):
        cf.compute_ema(model, state)


def test_an_average_kept_on_the_cpu(trajectory):
    state = cf.init_bema(trajectory, device='cpu')
    assert state.device == torch.device('cpu')
    assert {t.device.type for t in state.average().values()} == {'cpu'}


@pytest.mark.parametrize(('average_buffers', 'expected'), [(True, 0.25), (False, 1.0)])
def test_module_buffers_are_averaged_or_copied(average_buffers, expected):
    model = torch.nn.BatchNorm1d(1)
    state = cf.init_bema(model, update_freq=1, lag=15, average_buffers=average_buffers)
    model.running_mean.fill_(1.0)
    cf.compute_bema(model, state)
    assert state.average()['running_mean'].item() == expected


def test_a_swap_serves_an_evaluation_in_the_loop(trajectory):
    """The example of the module's docstring, with the weights before and after it."""
    state = cf.init_bema(trajectory, update_freq=10)
    follow(trajectory, state)
    training, average = trajectory.a.detach().clone(), state.average()['a'].clone()
    with state.applied_to(trajectory) as model:
        assert torch.equal(model.a, average)
        assert not torch.equal(model.a, training)
    assert torch.equal(trajectory.a, training)


def test_following_a_model_that_holds_the_average_is_an_error(trajectory):
    state = cf.init_bema(trajectory, update_freq=1)
    cf.compute_bema(trajectory, state)
    with state.applied_to(trajectory), pytest.raises(RuntimeError, match='needs the training weights'):
        cf.compute_bema(trajectory, state)


def test_a_step_taken_from_the_average_is_an_error_even_between_updates(trajectory):
    """The step was taken from averaged weights all the same, and swapping out will undo it."""
    state = cf.init_bema(trajectory, update_freq=10)
    assert run(state, trajectory, 10) == [10]
    with state.applied_to(trajectory), pytest.raises(RuntimeError, match='needs the training weights'):
        cf.compute_bema(trajectory, state)


@pytest.mark.parametrize('update_freq', [1, 2, 5])
def test_a_refused_step_is_not_counted(trajectory, update_freq):
    state = cf.init_bema(trajectory, update_freq=update_freq)
    run(state, trajectory, update_freq)
    for _ in range(3):
        with state.applied_to(trajectory), pytest.raises(RuntimeError, match='needs the training weights'):
            cf.compute_bema(trajectory, state)
    assert (state.step, state.num_updates) == (update_freq, 1)
    assert run(state, trajectory, update_freq) == [2 * update_freq]


@pytest.mark.parametrize('steps', [0, 2, 4])
def test_before_the_first_update_an_evaluation_sees_the_training_weights(trajectory, steps):
    """Before tau, at it, and after it; a step counts inside, since nothing is swapped."""
    state = cf.init_bema(trajectory, update_after=2, update_freq=3)
    advance(trajectory, state, steps)
    with state.applied_to(trajectory):
        assert_same_bits(trajectory.a.detach(), trajectory.at('a', steps))
        cf.compute_bema(trajectory, state)
    assert state.step == steps + 1
    assert_same_bits(trajectory.a.detach(), trajectory.at('a', steps))


def test_a_swap_before_tau_is_an_error(trajectory):
    state = cf.init_bema(trajectory, update_after=2)
    with pytest.raises(RuntimeError, match=r'no buffers yet: call start\(model\) first'):
        state.swap_in(trajectory)
    assert not state.swapped


@pytest.mark.parametrize('init', [cf.init_bema, cf.init_ema])
@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'device': 'cpuu'}, ValueError, "device must be None or the name of a device such as 'cpu', but is 'cpuu'."),
        ({'ema_power': -1}, ValueError, 'ema_power must be at least 0 and finite, but is -1.'),
        ({'ema_power': '0.5'}, TypeError, "ema_power must be a number, but is '0.5'."),
        ({'min_ema_multiplier': 2}, ValueError, 'min_ema_multiplier must be between 0 and 1, but is 2.'),
        ({'lag': None}, TypeError, 'lag must be a number, but is None.'),
        ({'half_life': 0}, ValueError, 'half_life must be positive, but is 0.'),
        (
            {'half_life': '10ep'},
            ValueError,
            "half_life must be a number of steps of at least 1, such as 400 or '400ba', but is '10ep'.",
        ),
    ],
)
def test_a_bad_setting_is_an_error_that_names_it(init, settings, error, message):
    with pytest.raises(error, match=f'^{re.escape(message)}$'):
        init(torch.nn.Linear(1, 1), **settings)


# ------------------------------------------------------------------------------------------------------ other averages


def test_a_loop_can_train_on_from_the_mean_of_its_latest_weights(trajectory):
    """As docstrings say; what led to the mean is in the next window, and not the mean."""
    state = cf.init_lawa(trajectory, update_freq=5, window=2)
    for step in range(1, 16):
        trajectory.go_to(step)
        if cf.compute_average(trajectory, state):
            state.copy_to(trajectory)
            steps = [5] if step == 5 else [step - 5, step]
            expected = trajectory.arrays['a'][steps].mean(axis=0)
            assert_close(trajectory.a.detach().numpy(), expected, 1e-6)


@pytest.mark.parametrize(
    ('saving', 'loading', 'message'),
    [
        (
            lambda m: cf.init_lawa(m, update_freq=1, window=3),
            lambda m: cf.init_lawa(m, update_freq=1, window=2),
            r"laid out for \{'window': 3\}, and these settings need \{'window': 2\}",
        ),
        (
            lambda m: cf.init_swa_window(m, update_freq=1, horizon=2),
            lambda m: cf.init_swa_window(m, update_freq=1, horizon=4, period=2),
            r"'periods': 1\}, and these settings need .*'periods': 2\}",
        ),
        (
            lambda m: cf.init_ouema(m, update_freq=1),
            lambda m: cf.init_lawa(m, update_freq=1, window=2),
            r"laid out for another rule, and these settings need \{'window': 2\}",
        ),
        (
            lambda m: cf.init_ouema(m, update_freq=1),
            lambda m: cf.init_ouema(m, update_freq=1, bias_power=None),
            "has no buffer 'ema', which these settings need",
        ),
    ],
)
def test_buffers_of_another_layout_are_refused_and_change_nothing(trajectory, saving, loading, message):
    state = saving(trajectory)
    for step in range(1, 6):
        trajectory.go_to(step)
        cf.compute_average(trajectory, state)
    other = loading(trajectory)
    before = saved_and_loaded(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved_and_loaded(state.state_dict()), trajectory)
    assert_same_bits(saved_and_loaded(other.state_dict()), before)


def test_ouema_counts_its_alpha_from_tau(trajectory):
    state = cf.init_ouema(trajectory, update_freq=2, update_after='5ba', bias_power=0.5, lag=3)
    assert state.rule.linear_step(9, 2, 0).coefficients['alpha'] == (1 + 9 - 5 + 3) ** -0.5


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda m: cf.init_lawa(m, update_freq=5, window=0), ValueError, 'window must be at least 1, but is 0'),
        (lambda m: cf.init_lawa(m, update_freq='1ep', window=2), ValueError, 'update_freq must be a number of steps'),
        (
            lambda m: cf.init_swa_window(m, update_freq=4, horizon=10),
            ValueError,
            'horizon is 10, .* no multiple of the 4',
        ),
        (
            lambda m: cf.init_swa_window(m, update_freq=2, horizon='8ba', period=3),
            ValueError,
            'period is 3, .* no multiple of the 2',
        ),
        (lambda m: cf.init_swa_window(m, update_freq=2, horizon=8, period=6), ValueError, 'no multiple of period, 6'),
        (lambda m: cf.init_dema(m, ema_power=None), ValueError, 'DEMA is an average of EMAs'),
        (lambda m: cf.init_ouema(m, bias_power=0), ValueError, 'bias_power must be positive'),
        (lambda m: cf.init_ouema(m, update_after=-1), ValueError, 'update_after must be a number of steps'),
    ],
)
def test_bad_settings_of_other_averages(trajectory, make, error, message):
    with pytest.raises(error, match=message):
        make(trajectory)


# ------------------------------------------------------------------------------------------------------------- resume


def advance(model: Trajectory, state: cf.LoopState, stop: int) -> None:
    for step in range(state.step + 1, stop + 1):
        model.go_to(step)
        cf.compute_bema(model, state)


INITS = {
    'bema': lambda model: cf.init_bema(model, update_freq=4),
    'bema after 7': lambda model: cf.init_bema(model, update_freq=3, update_after='7ba'),
    'ema half-life': lambda model: cf.init_ema(model, half_life=10, update_freq=2, update_after=5),
}


@pytest.mark.parametrize('swapped', [False, True])
@pytest.mark.parametrize('cut', [0, 3, 7, 8, 22])
@pytest.mark.parametrize('name', INITS)
def test_a_resumed_loop_equals_the_uninterrupted_one_bit_for_bit(golden, name, cut, swapped):
    """Cut before tau, at tau, between two updates and after many, and saved with either weights in the model."""
    arrays, init = golden('trajectory').arrays, INITS[name]
    model = Trajectory(arrays)
    state = init(model)
    advance(model, state, cut)
    # Before tau there is nothing to swap.
    if swapped and state.started:
        state.swap_in(model)
    file = saved_and_loaded({'model': model.state_dict(), 'average': state.state_dict()})
    state.swap_out()
    resumed_model = Trajectory(arrays, step=59)
    resumed_model.load_state_dict(file['model'])
    resumed = init(resumed_model)
    resumed.load_state_dict(file['average'], resumed_model)
    assert_same_bits(resumed_model.state_dict(), model.state_dict())
    assert_same_bits(resumed.state_dict(), state.state_dict())
    for pair in ((model, state), (resumed_model, resumed)):
        advance(*pair, stop=41)
    assert resumed.step == 41
    assert_same_bits(resumed.state_dict(), state.state_dict())


def test_a_resumed_loop_that_lost_its_count_differs(golden):
    """The control of the test above: the count of steps decides coefficients and update steps."""
    model = Trajectory(golden('trajectory').arrays)
    state = INITS['bema'](model)
    advance(model, state, 22)
    saved = saved_and_loaded(state.state_dict())
    resumed_model = Trajectory(golden('trajectory').arrays, step=22)
    resumed = INITS['bema'](resumed_model)
    resumed.load_state_dict({**saved, 'step': 19}, resumed_model)
    advance(model, state, 41)
    advance(resumed_model, resumed, 41)
    assert resumed.num_updates == state.num_updates + 1
    assert not torch.equal(resumed.average()['a'], state.average()['a'])


@pytest.mark.parametrize(
    ('key', 'error', 'message'),
    [
        ('step', ValueError, 'counts no steps: it was not saved by what init_bema and its like return'),
        ('last_update', KeyError, 'last_update'),
    ],
)
def test_a_state_without_a_count_of_steps_changes_nothing(trajectory, key, error, message):
    """Such as one that an Algorithm wrote."""
    state = cf.init_bema(trajectory, update_freq=1)
    saved = saved_and_loaded(state.state_dict())
    del saved[key]
    advance(trajectory, state, 5)
    before = saved_and_loaded(state.state_dict())
    with pytest.raises(error, match=message):
        state.load_state_dict(saved, trajectory)
    assert_same_bits(state.state_dict(), before)
