# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of a rule, folded in float64 by hand, are the published recurrences."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.decay import ConstantDecay, HalfLifeDecay, PowerDecay, reference_decay
from composer_bema.averaging.rules import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    THETA,
    Difference,
    Latest,
    Lerp,
    Rule,
    bema_rule,
    dema_rule,
    ema_rule,
    ouema_rule,
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


def test_the_dema_step_reads_as_its_docstring():
    rule = DEMA(beta=PowerDecay(0.5))
    beta = 32**-0.5
    assert rule.linear_step(22, 1.0, 0).rows == (
        Lerp('ema', 'theta', beta),
        Lerp('ema_of_ema', 'ema', beta),
        Difference('dema', 'ema', 1.0, 'ema', 'ema_of_ema'),
    )
    assert rule.linear_step(22, 1.0, 0).coefficients == {'beta': beta}
    assert (rule.buffers, rule.constants, rule.average) == (('ema', 'ema_of_ema', 'dema'), (), 'dema')


def test_two_updates_of_dema_by_hand():
    """With beta 1/4, theta goes 8 -> 16 -> 24."""
    rule = DEMA(beta=ConstantDecay(0.25))
    after_one = fold(rule, 8.0, [1], [16.0])
    # ema = 3/4 8 + 1/4 16 = 10; ema_of_ema = 3/4 8 + 1/4 10 = 8.5, from the new ema; dema = 2 10 - 8.5 = 11.5.
    assert (after_one['ema'], after_one['ema_of_ema'], after_one['dema']) == (10.0, 8.5, 11.5)
    after_two = fold(rule, 8.0, [1, 2], [16.0, 24.0])
    # ema = 3/4 10 + 1/4 24 = 13.5; ema_of_ema = 3/4 8.5 + 1/4 13.5 = 9.75; dema = 2 13.5 - 9.75 = 17.25.
    assert (after_two['ema'], after_two['ema_of_ema'], after_two['dema']) == (13.5, 9.75, 17.25)


def test_two_updates_of_ouema_by_hand():
    """With alpha 1/5 and beta 1/4, theta goes 8 -> 16 -> 4."""
    rule = OUEMA(alpha=ConstantDecay(0.2), beta=ConstantDecay(0.25))
    after_one = fold(rule, 8.0, [1], [16.0])
    # u = (16 - 1/5 8) / (4/5) = 18; ouema = 3/4 8 + 1/4 18 = 10.5.
    assert (after_one['theta_0'], after_one['ouema']) == (8.0, pytest.approx(10.5, rel=1e-15))
    after_two = fold(rule, 8.0, [1, 2], [16.0, 4.0])
    # u = (4 - 1/5 8) / (4/5) = 3; ouema = 3/4 10.5 + 1/4 3 = 8.625.
    assert (after_two['theta_0'], after_two['ouema']) == (8.0, pytest.approx(8.625, rel=1e-15))
    assert rule.linear_step(2, 1.0, 1).coefficients == {'alpha': 0.2, 'beta': 0.25}
    assert (rule.buffers, rule.constants, rule.average) == (('theta_0', 'ouema'), ('theta_0',), 'ouema')


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


def test_dema_takes_its_rate_as_the_ema_does():
    for rate in ({}, {'ema_power': 0.7, 'lag': 3, 'multiplier': 2, 'min_ema_multiplier': 0.1}):
        assert dema_rule(**rate) == DEMA(ema_rule(**rate).beta)
    assert dema_rule() == DEMA(PowerDecay(0.5, 10, 1, floor=0.0))
    # These replace the power, which may be switched off then.
    for ema_power in (0.5, None):
        assert dema_rule(ema_power, half_life=8) == DEMA(HalfLifeDecay(8))
        assert dema_rule(ema_power, smoothing=0.99) == DEMA(ConstantDecay(1 - 0.99))


def test_dema_without_an_ema_is_an_error():
    with pytest.raises(ValueError, match=r'^DEMA is an average of EMAs: give ema_power, half_life or smoothing\.$'):
        dema_rule(ema_power=None)


def test_the_alpha_of_ouema_counts_from_the_burn_in():
    """It is (1 + max(t - tau + rho, 1))^-eta, as the reference's; beta is (rho + gamma t)^-kappa, as everywhere."""
    rule = ouema_rule(bias_power=0.5, lag=10, multiplier=2, update_after=100)
    assert rule.linear_step(105, 1.0, 0).coefficients == {'alpha': 16**-0.5, 'beta': 220**-0.5}
    assert rule.linear_step(114, 1.0, 0).coefficients['alpha'] == 0.2
    # Never younger than 1, even long before tau: alpha stays below 1, for u divides by the rest.
    assert rule.linear_step(0, 1.0, 0).coefficients['alpha'] == 2**-0.5
    assert ouema_rule(bias_power=0.5).linear_step(5, 1.0, 0).coefficients['alpha'] == 0.25


def test_the_defaults_of_ouema_are_bemas():
    assert ouema_rule() == OUEMA(alpha=reference_decay(0.2, 10, 0), beta=bema_rule().beta)
    assert ouema_rule(half_life=8).beta == HalfLifeDecay(8)
    assert ouema_rule(min_ema_multiplier=0.1).beta == PowerDecay(0.5, floor=0.1)
    assert ouema_rule(ema_power=None).beta == ConstantDecay(1.0)


def test_without_a_correction_ouema_is_the_ema():
    assert ouema_rule(bias_power=None, lag=3, min_ema_multiplier=0.1) == ema_rule(lag=3, min_ema_multiplier=0.1)
    assert ouema_rule(bias_power=None, half_life=8, update_after=100) == EMA(HalfLifeDecay(8))


@pytest.mark.parametrize('zero', [0, 0.0])
def test_ouema_has_no_full_correction(zero):
    """An eta of 0 is BEMA's full correction for ever, and here a division by zero."""
    with pytest.raises(
        ValueError, match=r'^bias_power must be positive, but is 0, which would divide by zero in OUEMA'
    ):
        ouema_rule(bias_power=zero)


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
        ({'half_life': 10, 'min_ema_multiplier': 2}, 'min_ema_multiplier must be'),
        ({'half_life': 10, 'min_ema_multiplier': 0.1}, 'min_ema_multiplier has no effect beside half_life'),
        ({'half_life': 10, 'ema_power': 0.7}, 'ema_power has no effect beside half_life'),
        ({'smoothing': 0.9, 'min_ema_multiplier': 0.1}, 'min_ema_multiplier has no effect beside smoothing'),
    ],
)
def test_bad_settings_are_errors_that_name_the_users_setting(settings, message):
    for rule in (ema_rule, dema_rule, bema_rule, ouema_rule):
        if rule in (ema_rule, dema_rule) or 'smoothing' not in settings:
            with pytest.raises(ValueError, match=f'^{message}'):
                rule(**settings)


@pytest.mark.parametrize('rule', [ema_rule, bema_rule, ouema_rule])
def test_a_bad_floor_is_an_error_even_without_an_ema(rule):
    with pytest.raises(ValueError, match=r'^min_ema_multiplier must be between 0 and 1, but is 2\.'):
        rule(ema_power=None, min_ema_multiplier=2)


@pytest.mark.parametrize('rule', [bema_rule, ouema_rule])
def test_bad_corrections_are_errors(rule):
    with pytest.raises(ValueError, match=r'^bias_power must be at least 0 and finite, but is -0\.2\.'):
        rule(bias_power=-0.2)
    with pytest.raises(TypeError, match=r"^bias_power must be a number, but is '0\.2'\."):
        rule(bias_power='0.2')


@pytest.mark.parametrize(
    'name', ['ema_power', 'lag', 'multiplier', 'min_ema_multiplier', 'half_life', 'smoothing', 'bias_power']
)
def test_settings_that_are_no_numbers_are_errors_that_name_them(name):
    """`half_life: 10ba` and `bias_power: off` are what a recipe might say."""
    takes_it = {'smoothing': (ema_rule, dema_rule), 'bias_power': (bema_rule, ouema_rule)}
    for rule in takes_it.get(name, (ema_rule, dema_rule, bema_rule, ouema_rule)):
        for value in ('10ba', False):
            with pytest.raises(TypeError, match=f'^{name} must be a number, but is {value!r}'):
                rule(**{name: value})


@pytest.mark.parametrize('rule', [bema_rule(), dema_rule(), ouema_rule()])
def test_batch_statistics_are_never_corrected(rule):
    """A negative coefficient can push a variance below zero: module buffers follow the EMA that is underneath."""
    assert rule.statistics == EMA(rule.beta)
    assert rule.statistics.statistics == rule.statistics


def test_latest_forgets_everything():
    weights = coefficients(Latest(), [3, 4])
    np.testing.assert_array_equal(weights['latest'], [0, 0, 1])
    assert Latest().statistics == Latest()
