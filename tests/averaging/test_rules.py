# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of a rule, folded in float64 by hand, are the published recurrences."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.decay import ConstantDecay, HalfLifeDecay, PowerDecay
from composer_bema.averaging.rules import (
    BEMA,
    EMA,
    THETA,
    THETA_0,
    Difference,
    Latest,
    Lerp,
    Rule,
    bema_rule,
    ema_rule,
)
from tests.averaging.reference import apply_rows

powers = st.none() | st.floats(min_value=0, max_value=4)
settings = st.fixed_dictionaries(
    {
        'ema_power': powers,
        'bias_power': powers,
        'lag': st.floats(min_value=0, max_value=100),
        'multiplier': st.floats(min_value=0, max_value=10),
        'min_ema_multiplier': st.floats(min_value=0, max_value=1),
    }
)
step_lists = st.lists(st.integers(min_value=0, max_value=10**5), min_size=1, max_size=12, unique=True).map(sorted)


def fold(rule: Rule, start: Any, steps: Iterable[int], thetas: Iterable[Any]) -> dict[str, Any]:
    """The buffers of a rule after updates at `steps`, from `start`."""
    values = dict.fromkeys(rule.buffers, start)
    for index, (step, theta) in enumerate(zip(steps, thetas, strict=True)):
        values[THETA] = theta
        apply_rows(rule.linear_step(step, 1.0, index), values)
    return values


def coefficients(rule: Rule, steps: list[int]) -> dict[str, np.ndarray]:
    """How much the weights at tau (first) and at each update weigh in each buffer."""
    units = np.eye(len(steps) + 1)
    return fold(rule, units[0], steps, units[1:])


def test_the_bema_step_reads_as_the_paper_writes_it():
    rule = BEMA(alpha=PowerDecay(0.2), beta=PowerDecay(0.5))
    step = rule.linear_step(22, 1.0, 0)
    alpha, beta = 32**-0.2, 32**-0.5
    assert step.rows == (Lerp('ema', 'theta', beta), Difference('bema', 'ema', alpha, 'theta', 'theta_0'))
    assert step.coefficients == {'alpha': alpha, 'beta': beta}
    assert (rule.buffers, rule.constants, rule.average) == (('theta_0', 'ema', 'bema'), ('theta_0',), 'bema')


def test_two_updates_of_bema_by_hand():
    """With alpha 1/2 and beta 1/4, theta goes 8 -> 16 -> 4."""
    rule = BEMA(alpha=ConstantDecay(0.5), beta=ConstantDecay(0.25))
    after_one = fold(rule, 8.0, [1], [16.0])
    # ema = 3/4 8 + 1/4 16 = 10; bema = 10 + 1/2 (16 - 8) = 14.
    assert (after_one['theta_0'], after_one['ema'], after_one['bema']) == (8.0, 10.0, 14.0)
    after_two = fold(rule, 8.0, [1, 2], [16.0, 4.0])
    # ema = 3/4 10 + 1/4 4 = 8.5; bema = 8.5 + 1/2 (4 - 8) = 6.5: the correction is not accumulated.
    assert (after_two['theta_0'], after_two['ema'], after_two['bema']) == (8.0, 8.5, 6.5)


@given(settings=settings, steps=step_lists)
def test_the_coefficients_of_every_average_sum_to_one(settings, steps):
    """Weights that stand still are their own average, so the checkpoints weigh 1 together, after any updates."""
    rule = bema_rule(**settings)
    weights = coefficients(rule, steps)
    for buffer in rule.buffers:
        assert weights[buffer].sum() == pytest.approx(1, abs=1e-12)
    assert (weights['ema'] >= -1e-15).all()


@given(settings=settings, steps=step_lists)
def test_bema_is_the_ema_and_a_correction_of_the_newest_weights(settings, steps):
    """Beside alpha at the newest weights and -alpha at theta_0, BEMA weighs every checkpoint as its EMA does."""
    settings['bias_power'] = 0.3 if settings['bias_power'] is None else settings['bias_power']
    rule = bema_rule(**settings)
    assert isinstance(rule, BEMA)
    weights = coefficients(rule, steps)
    correction = np.zeros(len(steps) + 1)
    alpha = rule.linear_step(steps[-1], 1.0, 0).coefficients['alpha']
    correction[[0, -1]] = -alpha, alpha
    np.testing.assert_allclose(weights['bema'], weights['ema'] + correction, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(weights['theta_0'], np.eye(len(steps) + 1)[0])
    ema = EMA(rule.beta)
    np.testing.assert_array_equal(weights['ema'], coefficients(ema, steps)['ema'])


@given(steps=step_lists)
def test_without_an_ema_only_the_newest_weights_are_corrected(steps):
    """`ema_power=None` is beta = 1: BEMA = theta + alpha (theta - theta_0)."""
    weights = coefficients(bema_rule(ema_power=None, bias_power=0.2), steps)
    alpha = (10.0 + steps[-1]) ** -0.2
    expected = np.zeros(len(steps) + 1)
    expected[0], expected[-1] = -alpha, 1 + alpha
    np.testing.assert_allclose(weights['bema'], expected, rtol=0, atol=1e-15)


def test_without_a_correction_bema_is_the_ema():
    """`bias_power=None` keeps one buffer, and not three of which two would be idle."""
    assert bema_rule(bias_power=None, lag=3, min_ema_multiplier=0.1) == ema_rule(lag=3, min_ema_multiplier=0.1)
    assert bema_rule(bias_power=None) == EMA(PowerDecay(0.5, 10, 1))


def test_a_power_of_zero_is_not_off():
    """A kappa of 0 keeps no history; an eta of 0 corrects fully and for ever."""
    assert bema_rule(ema_power=0.0).linear_step(10**6, 1.0, 0).coefficients['beta'] == 1
    assert bema_rule(bias_power=0.0).linear_step(10**6, 1.0, 0).coefficients['alpha'] == 1


def test_the_defaults_are_the_papers():
    rule = bema_rule()
    assert rule == BEMA(alpha=PowerDecay(0.2, 10, 1), beta=PowerDecay(0.5, 10, 1, floor=0.0))
    assert rule.linear_step(0, 1.0, 0).coefficients == {'alpha': 10**-0.2, 'beta': 10**-0.5}


def test_the_floor_holds_beta_only():
    step = bema_rule(min_ema_multiplier=0.9).linear_step(1000, 1.0, 0)
    assert step.coefficients == {'alpha': 1010**-0.2, 'beta': 0.9}


def test_a_constant_rate_replaces_the_power_of_the_ema_only():
    assert ema_rule(smoothing=0.99) == EMA(ConstantDecay(1 - 0.99))
    assert ema_rule(smoothing=0.0).linear_step(7, 1.0, 0).coefficients == {'beta': 1.0}
    assert ema_rule(half_life=8) == EMA(HalfLifeDecay(8))
    rule = bema_rule(half_life=8)
    assert rule == BEMA(alpha=PowerDecay(0.2), beta=HalfLifeDecay(8))
    assert rule.linear_step(100, 8.0, 0).coefficients['beta'] == pytest.approx(0.5, rel=1e-15)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'smoothing': 1}, r'smoothing must be below 1, or the average would never move\.'),
        ({'smoothing': 1.0}, 'smoothing must be below 1'),
        ({'smoothing': 1.5}, r'smoothing must be between 0 and 1, but is 1\.5\.'),
        ({'smoothing': -0.1}, r'smoothing must be between 0 and 1, but is -0\.1\.'),
        ({'smoothing': 0.9, 'half_life': 10}, 'half_life and smoothing both fix the rate of the EMA: give one'),
        ({'half_life': 0}, r'half_life must be positive, but is 0\.'),
        ({'half_life': -1}, r'half_life must be at least 0 and finite, but is -1\.'),
        ({'ema_power': -1}, r'ema_power must be at least 0 and finite, but is -1\.'),
        ({'lag': -1}, r'lag must be at least 0 and finite, but is -1\.'),
        ({'multiplier': math.inf}, r'multiplier must be at least 0 and finite, but is inf\.'),
        ({'min_ema_multiplier': 2}, r'min_ema_multiplier must be between 0 and 1, but is 2\.'),
        # Even where the EMA does not read it: the correction does, or nothing does and it is a slip.
        ({'half_life': 10, 'lag': -1}, 'lag must be'),
        ({'smoothing': 0.9, 'multiplier': -1}, 'multiplier must be'),
        ({'ema_power': None, 'min_ema_multiplier': 2}, 'min_ema_multiplier must be'),
    ],
)
def test_bad_settings_are_errors_that_name_the_users_setting(settings, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        ema_rule(**settings)
    if 'smoothing' not in settings:
        with pytest.raises(ValueError, match=f'^{message}'):
            bema_rule(**settings)


def test_bad_settings_of_bema_are_errors():
    with pytest.raises(ValueError, match=r'^bias_power must be at least 0 and finite, but is -0\.2\.'):
        bema_rule(bias_power=-0.2)
    with pytest.raises(TypeError, match=r"^bias_power must be a number, but is '0\.2'\."):
        bema_rule(bias_power='0.2')


@pytest.mark.parametrize(
    'name', ['ema_power', 'lag', 'multiplier', 'min_ema_multiplier', 'half_life', 'smoothing', 'bias_power']
)
def test_settings_that_are_no_numbers_are_errors_that_name_them(name):
    """`half_life: 10ba` and `bias_power: off` are what a recipe might say."""
    rule = ema_rule if name == 'smoothing' else bema_rule
    for value in ('10ba', False):
        with pytest.raises(TypeError, match=f'^{name} must be a number, but is {value!r}'):
            rule(**{name: value})


def test_batch_statistics_are_never_corrected():
    """A correction can push a variance below zero: module buffers follow the EMA that BEMA corrects."""
    rule = bema_rule()
    assert isinstance(rule, BEMA)
    assert rule.statistics == EMA(rule.beta)
    assert rule.statistics.statistics == rule.statistics


def test_latest_forgets_everything():
    weights = coefficients(Latest(), [3, 4])
    np.testing.assert_array_equal(weights['latest'], [0, 0, 1])
    assert Latest().statistics == Latest()


def offline_rule(settings: Mapping[str, Any]) -> Rule:
    """Our rule under the schedules of the reference offline code."""
    tau, lag = settings['update_after'], settings['scaling_lag']
    ema_tau = tau if settings['ema_update_after'] is None else settings['ema_update_after']
    if 0 < settings['ema_power'] < 1:
        beta = PowerDecay(
            settings['ema_power'],
            lag=1,
            multiplier=settings['ema_gamma'],
            origin=ema_tau - lag,
            min_age=1,
            floor=settings['min_ema_multiplier'],
        )
    else:
        beta = ConstantDecay(1.0)
    if settings['eta_power'] < 0:
        return EMA(beta)
    return BEMA(alpha=PowerDecay(settings['eta_power'], lag=1, origin=tau - lag, min_age=1), beta=beta)


# bema02 is left out: the reference overwrites its own theta_0 there (bema03 shows what was meant).
@pytest.mark.parametrize('id', [f'bema{i:02}' for i in range(12) if i != 2])
def test_folding_a_rule_gives_the_offline_averages_of_the_reference(golden, id):
    """Our rows in float64, along the checkpoints, are what the authors' offline code computes in float32."""
    offline, trajectory = golden('abblock_offline'), golden('trajectory').arrays
    settings, arrays = offline.configs[id]['kwargs'], offline.of(id)
    rule = offline_rule(settings)
    steps, updated = offline.arrays['steps'], arrays['updated']
    first = int(np.argmax(updated))
    for name in ('a', 'b', 'c', 'f', 'r'):
        weights = trajectory[name].astype(np.float64)
        # The reference takes theta_0 at its first update, but starts the averages one checkpoint earlier.
        start = weights[steps[first - 1]] if first else weights[0]
        values = dict.fromkeys(rule.buffers, start)
        if settings['update_after'] > 0:
            values[THETA_0] = weights[steps[first]]
        for row, step in enumerate(steps):
            if not updated[row]:
                continue
            values[THETA] = weights[step]
            apply_rows(rule.linear_step(int(step), 5.0, 0), values)
            np.testing.assert_allclose(values[rule.average], arrays[f'running/{name}'][row], rtol=0, atol=5e-6)
            if isinstance(rule, BEMA) and settings['ema_power'] > 0:
                np.testing.assert_allclose(values['ema'], arrays[f'ema/{name}'][row], rtol=0, atol=5e-6)
    assert updated.sum() >= 9
