# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Coefficients by hand, for every rule; they give what the online average and the reference's offline code give."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.coefficients import fold, fold_back
from composer_bema.averaging.decay import ConstantDecay, HalfLifeDecay, PowerDecay, reference_decay
from composer_bema.averaging.rules import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    THETA,
    THETA_0,
    Latest,
    Rule,
    bema_rule,
    dema_rule,
    ema_rule,
    ouema_rule,
)
from composer_bema.averaging.state import AverageState
from composer_bema.averaging.windows import DecayShape, SWAWindow, Window
from tests.averaging.reference import apply_rows

OFFLINE_IDS = [
    *(f'bema{i:02}' for i in range(12)),
    *(f'ouema{i:02}' for i in range(7)),
    *(f'dema{i:02}' for i in range(6)),
]

lags = st.floats(min_value=0, max_value=100)
decays = st.one_of(
    st.builds(
        PowerDecay,
        st.floats(min_value=0, max_value=4),
        lags,
        st.floats(min_value=0, max_value=10),
        floor=st.floats(min_value=0, max_value=1),
    ),
    st.builds(HalfLifeDecay, st.floats(min_value=1e-2, max_value=1e6)),
    st.builds(ConstantDecay, st.floats(min_value=0, max_value=1)),
)
# What is left of theta_0 has to stay below 1, for OUEMA divides by the rest.
remainders = st.one_of(
    st.builds(reference_decay, st.floats(min_value=0.1, max_value=4), lags, st.integers(min_value=0, max_value=10**5)),
    st.builds(ConstantDecay, st.floats(min_value=0, max_value=0.9)),
)
emas = st.builds(EMA, decays)
bemas = st.builds(BEMA, alpha=decays, beta=decays)
windows = st.one_of(
    st.builds(Window, st.integers(min_value=1, max_value=6), st.sampled_from(get_args(DecayShape))),
    st.builds(SWAWindow, st.integers(min_value=1, max_value=4), st.integers(min_value=1, max_value=3)),
)
rules = st.one_of(
    emas,
    bemas,
    st.builds(DEMA, decays),
    st.builds(OUEMA, alpha=remainders, beta=decays),
    windows,
    st.just(Latest()),
)
# The step at which the buffers start, and those of the updates.
step_lists = st.lists(st.integers(min_value=0, max_value=10**5), min_size=2, max_size=14, unique=True).map(sorted)


# -------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ('rule', 'rows'),
    [
        (EMA(ConstantDecay(0.25)), [[0.75, 0.25, 0], [0.5625, 0.1875, 0.25]]),
        # The EMA, with 1/2 less at theta_0 and 1/2 more at the newest; the correction is not accumulated.
        (BEMA(ConstantDecay(0.5), ConstantDecay(0.25)), [[0.25, 0.75, 0], [0.0625, 0.1875, 0.75]]),
        # S is the EMA above; D is (15/16, 1/16, 0), then 3/4 D + 1/4 S = (27/32, 3/32, 1/16); the average is 2 S - D.
        (
            DEMA(ConstantDecay(0.25)),
            [[1.5 - 15 / 16, 0.5 - 1 / 16, 0], [1.125 - 27 / 32, 0.375 - 3 / 32, 0.5 - 1 / 16]],
        ),
        # u is (theta - theta_0 / 5) / (4/5) = 5/4 theta - 1/4 theta_0, and weighs 1/4.
        (
            OUEMA(ConstantDecay(0.2), ConstantDecay(0.25)),
            [[0.75 - 1 / 16, 5 / 16, 0], [0.75 * (0.75 - 1 / 16) - 1 / 16, 0.75 * 5 / 16, 5 / 16]],
        ),
        (Window(2), [[0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]),
        (Window(3, 'cosine'), [[0, 1, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0.25, 0.5, 0.25, 0], [0, 0, 0.25, 0.5, 0.25]]),
        (SWAWindow(2), [[0, 1, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0.5, 0.5]]),
        (SWAWindow(1, periods=2), [[0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]),
        (Latest(), [[0, 1, 0], [0, 0, 1]]),
    ],
)
def test_rows_by_hand(rule, rows):
    """A row an update: the weights at the start first, then those at each update."""
    coefficients = fold(rule, 0, range(1, 1 + len(rows)))
    assert coefficients.dtype == np.float64
    np.testing.assert_allclose(coefficients, rows, rtol=0, atol=1e-15)


@given(rule=rules, steps=step_lists)
def test_folded_back_is_the_last_row(rule, steps):
    updates = list(zip(steps[1:], steps, strict=False))
    linear_steps = [rule.linear_step(step, step - before, index) for index, (step, before) in enumerate(updates)]
    last = fold(rule, steps[0], steps[1:])[-1]
    scale = np.abs(last).max()
    np.testing.assert_allclose(fold_back(linear_steps, rule.average), last, rtol=0, atol=1e-12 * scale)


def test_folded_back_without_an_update_is_the_start():
    np.testing.assert_array_equal(fold_back([], 'bema'), [1.0])


def test_schedules_see_the_steps_of_the_checkpoints():
    """With the defaults beta is (10 + t)^-0.5: 1/4 at step 6 and 1/5 at step 15, wherever the buffers started."""
    rows = [[0.75, 0.25, 0], [0.75 * 0.8, 0.25 * 0.8, 0.2]]
    for start in (0, 5):
        np.testing.assert_allclose(fold(ema_rule(), start, [6, 15]), rows, rtol=0, atol=1e-15)


def test_half_lives_count_in_steps():
    """From step 100 a half-life of 50 has passed once at step 150 and twice more at step 250."""
    rows = [[1 / 2, 1 / 2, 0], [1 / 8, 1 / 8, 3 / 4]]
    np.testing.assert_allclose(fold(ema_rule(half_life=50), 100, [150, 250]), rows, rtol=0, atol=1e-15)


@given(half_life=st.floats(min_value=1, max_value=1e6), steps=step_lists)
def test_with_a_half_life_the_start_is_forgotten_by_time_alone(half_life, steps):
    """2^(-time / half_life) of it is left, however many updates there were on the way."""
    start, *steps = steps
    left = fold(ema_rule(half_life=half_life), start, steps)[:, 0]
    np.testing.assert_allclose(left, [2 ** (-(step - start) / half_life) for step in steps], rtol=0, atol=1e-12)


def test_before_an_update_there_is_no_row():
    assert fold(bema_rule(), 0, []).shape == (0, 1)


@pytest.mark.parametrize('rule', [ema_rule(), bema_rule(), dema_rule(), ouema_rule(), Window(3), SWAWindow(2)])
def test_one_update(rule):
    [row] = fold(rule, 3, [400])
    alpha, beta = 410**-0.2, 410**-0.5
    # OUEMA's alpha is (1 + max(t - tau + rho, 1))^-0.2, and its u is theta + alpha / (1 - alpha) (theta - theta_0).
    remainder = 411**-0.2
    newest = {
        EMA: beta,
        BEMA: beta + alpha,
        DEMA: 2 * beta - beta**2,
        OUEMA: beta / (1 - remainder),
        Window: 1.0,
        SWAWindow: 1.0,
    }[type(rule)]
    np.testing.assert_allclose(row, [1 - newest, newest], rtol=0, atol=1e-15)


def test_many_updates():
    """The EMA's closed form holds to the last of a thousand: (1 - beta)^(n - i) beta, and (1 - beta)^n at the start."""
    beta, updates = 0.01, 1000
    rows = fold(ema_rule(smoothing=1 - beta), 0, range(1, updates + 1))
    assert rows.shape == (updates, updates + 1)
    closed_form = [(1 - beta) ** updates, *(beta * (1 - beta) ** (updates - i) for i in range(1, updates + 1))]
    np.testing.assert_allclose(rows[-1], closed_form, rtol=1e-12)


def test_the_double_ema_does_not_lag_behind_a_straight_line():
    """With theta_t = t an EMA is (1 - beta) / beta behind in the end, which is 3 for beta = 1/4; DEMA is not."""
    times = np.arange(201)
    lag = {
        rule: 200 - fold(rule, 0, times[1:])[-1] @ times
        for rule in (EMA(ConstantDecay(0.25)), dema_rule(smoothing=0.75))
    }
    assert list(lag.values()) == pytest.approx([3, 0], rel=0, abs=1e-9)


def test_the_ouema_finds_what_a_process_that_forgets_as_alpha_says_tends_to():
    """Of theta_t = mu + alpha_t (theta_0 - mu) every u is mu, so that only the EMA's start knows of theta_0."""
    mu, theta_0, steps = 3.0, -5.0, [4, 9, 100]
    rule = ouema_rule(half_life=7, bias_power=0.3, lag=2)
    alphas = np.array([(1 + step + 2) ** -0.3 for step in steps])
    thetas = [theta_0, *(mu + alphas * (theta_0 - mu))]
    expected = [mu + 2 ** (-step / 7) * (theta_0 - mu) for step in steps]
    np.testing.assert_allclose(fold(rule, 0, steps) @ thetas, expected, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- properties


@given(rule=rules, steps=step_lists)
def test_the_checkpoints_weigh_one_together(rule, steps):
    """Weights that stand still are their own average, under every rule and after every update."""
    start, *steps = steps
    np.testing.assert_allclose(fold(rule, start, steps).sum(axis=1), 1, rtol=0, atol=1e-12)


@given(rule=rules, steps=step_lists)
def test_no_average_knows_what_comes_later(rule, steps):
    """A checkpoint weighs nothing before its time, and a shorter run's rows are the longer one's."""
    start, *steps = steps
    rows = fold(rule, start, steps)
    assert not np.triu(rows, k=2).any()
    shorter = fold(rule, start, steps[:-1])
    np.testing.assert_array_equal(shorter, rows[:-1, :-1])


@given(rule=st.one_of(emas, windows, st.just(Latest())), steps=step_lists)
def test_means_have_no_negative_weights(rule, steps):
    start, *steps = steps
    assert fold(rule, start, steps).min() >= 0


@given(rule=rules, steps=step_lists)
def test_the_statistics_of_every_rule_have_no_negative_weights(rule, steps):
    """They average variances, which have to stay positive."""
    start, *steps = steps
    assert fold(rule.statistics, start, steps).min() >= 0


@given(rule=bemas, steps=step_lists)
def test_bema_is_the_ema_and_a_correction(rule, steps):
    """It is alpha more at the newest weights and alpha less at theta_0, and the same in between."""
    start, *steps = steps
    correction = np.zeros((len(steps), 1 + len(steps)))
    for index, (step, previous) in enumerate(zip(steps, [start, *steps], strict=False)):
        alpha = rule.alpha(step, step - previous)
        correction[index, 0], correction[index, 1 + index] = -alpha, alpha
    np.testing.assert_allclose(
        fold(rule, start, steps), fold(EMA(rule.beta), start, steps) + correction, rtol=0, atol=1e-14
    )


@given(rule=rules, steps=step_lists, seed=st.integers(min_value=0, max_value=2**32 - 1))
def test_coefficients_give_what_the_rows_give_on_any_trajectory(rule, steps, seed):
    """The slow way: every buffer of every checkpoint, in float64."""
    start, *steps = steps
    trajectory = np.random.default_rng(seed).uniform(-1, 1, size=(1 + len(steps), 5))
    values: dict[str, Any] = dict.fromkeys(rule.buffers, trajectory[0])
    averages = []
    for index, step in enumerate(steps):
        values[THETA] = trajectory[1 + index]
        apply_rows(rule.linear_step(step, step - (steps[index - 1] if index else start), index), values)
        averages.append(values[rule.average])
    np.testing.assert_allclose(fold(rule, start, steps) @ trajectory, averages, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- online


ONLINE = {
    'ema': ema_rule(),
    'ema, half-life': ema_rule(half_life=6),
    'ema, smoothing': ema_rule(smoothing=0.9),
    'bema': bema_rule(),
    'bema, half-life': bema_rule(half_life=6),
    'bema, no ema': bema_rule(ema_power=None),
    'dema': dema_rule(),
    'dema, half-life': dema_rule(half_life=6),
    'ouema': ouema_rule(),
    'ouema, half-life': ouema_rule(half_life=6, update_after=3),
    'window': Window(3),
    'window, 1-sqrt': Window(4, '1-sqrt'),
    'swa': SWAWindow(2),
    'swa, periods': SWAWindow(2, periods=2),
}


@pytest.mark.parametrize(('dtype', 'atol'), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize('name', ONLINE)
def test_online_equals_offline(make_mlp, name, dtype, atol):
    """A state that follows a run holds, after each update, what the coefficients make of the run's snapshots."""
    model, rule = make_mlp(dtype=dtype), ONLINE[name]
    state = AverageState(rule)
    state.start(model)
    start, steps = 3, [4, 6, 10, 11, 20, 45, 46]
    coefficients = {each: fold(each, start, steps) for each in (rule, rule.statistics, Latest())}
    snapshots = [snapshot(model)]
    for index, (step, previous) in enumerate(zip(steps, [start, *steps], strict=False)):
        move(model)
        snapshots.append(snapshot(model))
        state.update(model, step, elapsed=step - previous)
        average = state.average()
        # Layer 3 is frozen.
        assert average.keys() == {n for n in snapshots[0] if not n.startswith('3.')}
        for n, tensor in average.items():
            row = coefficients[rule_of(n, rule)][index, : len(snapshots)]
            expected = np.tensordot(row, np.stack([weights[n] for weights in snapshots]), 1)
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=atol)
    for n in ('0.weight', '1.bias', '1.running_mean', '1.running_var'):
        assert np.abs(snapshots[-1][n] - snapshots[0][n]).max() > 0.1


def rule_of(name: str, rule: Rule) -> Rule:
    """The rule that a tensor of the tiny model falls under."""
    if name.endswith('num_batches_tracked'):
        return Latest()
    return rule.statistics if 'running' in name else rule


def move(model: torch.nn.Module) -> None:
    """A random step; BatchNorm's statistics follow a batch."""
    model(torch.randn(16, 4, dtype=model[0].weight.dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def snapshot(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy().copy() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------- golden numbers


def reference_rule(config: dict[str, Any]) -> Rule:
    """Our rule under the schedules of the reference offline code."""
    settings = config['kwargs']
    tau, lag = settings['update_after'], settings['scaling_lag']
    ema_tau = tau if settings['ema_update_after'] is None else settings['ema_update_after']
    beta = ConstantDecay(1.0)
    if 0 < settings['ema_power'] < 1:
        beta = reference_decay(
            settings['ema_power'], lag, ema_tau, settings['ema_gamma'], settings['min_ema_multiplier']
        )
    if config['cls'] == 'core_offline.DEMA':
        return DEMA(beta)
    if settings['eta_power'] < 0:
        return EMA(beta)
    make = {'core_offline.BEMA': BEMA, 'core_offline.OUEMA': OUEMA}[config['cls']]
    return make(alpha=reference_decay(settings['eta_power'], lag, tau), beta=beta)


def start_of_the_averages(steps: np.ndarray, updated: np.ndarray) -> int:
    """The checkpoint before the first updated one; the initial weights if there is none."""
    return int(steps[updated[0] - 1]) if updated[0] else 0


def test_all_golden_numbers_of_the_reference_are_used(golden):
    offline = golden('abblock_offline')
    assert list(offline.configs) == OFFLINE_IDS
    assert {key.split('/')[0] for key in offline.arrays} == {'steps', *OFFLINE_IDS}


@pytest.mark.parametrize('id', OFFLINE_IDS)
def test_our_schedules_are_the_references(golden, id):
    """They agree in alpha and beta at every update, and beta is 1 where the reference has no EMA.

    Of OUEMA the reference records 1 / (1 - alpha) and alpha / (1 - alpha).
    """
    offline = golden('abblock_offline')
    rule, arrays = reference_rule(offline.configs[id]), offline.of(id)
    updated = np.flatnonzero(arrays['updated'])
    used = [rule.linear_step(int(offline.arrays['steps'][row]), 5.0, 0).coefficients for row in updated]
    expected = {'beta': np.nan_to_num(arrays['beta'][updated], nan=1.0)}
    if isinstance(rule, BEMA):
        expected['alpha'] = arrays['alpha'][updated]
    if isinstance(rule, OUEMA):
        expected['mult1'], expected['mult2'] = arrays['mult1'][updated], arrays['mult2'][updated]
        used = [
            {'beta': each['beta'], 'mult1': 1 / (1 - each['alpha']), 'mult2': each['alpha'] / (1 - each['alpha'])}
            for each in used
        ]
    for name, values in expected.items():
        np.testing.assert_allclose([each[name] for each in used], values, rtol=0, atol=1e-12)
    assert used[0].keys() == expected.keys()


@pytest.mark.parametrize('id', OFFLINE_IDS)
def test_our_rows_give_the_offline_averages_of_the_reference(golden, id):
    """Every buffer after every update, from the same starts as the reference's.

    With `update_after` its averages start from the checkpoint before the first updated one, but theta_0 is that one.
    In bema02, and there alone, it shows a bug: the first update writes zeros into the very tensor that it keeps as
    theta_0. We reproduce it by zeroing theta_0 after that update.
    """
    offline, trajectory = golden('abblock_offline'), golden('trajectory').arrays
    config, arrays, steps = offline.configs[id], offline.of(id), offline.arrays['steps']
    rule, burnt_in = reference_rule(config), config['kwargs']['update_after'] > 0
    loses_theta_0 = isinstance(rule, BEMA) and burnt_in and not config['theta0_restored']
    assert loses_theta_0 == (id == 'bema02')
    buffers = {'running': rule.average, 'ema': 'ema', 'theta0': THETA_0, 'single': 'ema', 'double': 'ema_of_ema'}
    compared = {key: name for key, name in buffers.items() if name in rule.buffers and f'{key}/a' in arrays}
    updated = np.flatnonzero(arrays['updated'])
    for tensor in ('a', 'b', 'c', 'f', 'r'):
        weights = trajectory[tensor].astype(np.float64)
        values = dict.fromkeys(rule.buffers, weights[start_of_the_averages(steps, updated)])
        if burnt_in:
            values[THETA_0] = weights[steps[updated[0]]]
        for count, row in enumerate(updated):
            values[THETA] = weights[steps[row]]
            apply_rows(rule.linear_step(int(steps[row]), 5.0, count), values)
            if loses_theta_0 and count == 0:
                values[THETA_0] = np.zeros_like(values[THETA_0])
            for key, name in compared.items():
                np.testing.assert_allclose(values[name], arrays[f'{key}/{tensor}'][row], rtol=0, atol=5e-6)
    assert len(updated) >= 9
    # Of an EMA the reference's BEMA records `ema` beside `running`, and its OUEMA does not.
    assert len(compared) == {BEMA: 3, OUEMA: 2, DEMA: 3, EMA: 1 if id == 'ouema03' else 2}[type(rule)]


# In the others theta_0 is of a later checkpoint than the weights that the averages start from.
@pytest.mark.parametrize(
    'id', [id for id in OFFLINE_IDS if id not in ('bema02', 'bema03', 'bema05', 'bema11', 'ouema02', 'ouema05')]
)
def test_coefficients_give_the_offline_averages_of_the_reference(golden, id):
    """The same from all the checkpoints at once, wherever the reference starts every buffer from the same weights."""
    offline, trajectory = golden('abblock_offline'), golden('trajectory').arrays
    arrays, rule = offline.of(id), reference_rule(offline.configs[id])
    updated = np.flatnonzero(arrays['updated'])
    start, steps = start_of_the_averages(offline.arrays['steps'], updated), offline.arrays['steps'][updated].tolist()
    rows = fold(rule, start, steps)
    for tensor in ('a', 'b', 'c', 'f', 'r'):
        weights = trajectory[tensor][[start, *steps]].astype(np.float64)
        averages = np.tensordot(rows, weights, 1)
        np.testing.assert_allclose(averages, arrays[f'running/{tensor}'][updated], rtol=0, atol=5e-6)
