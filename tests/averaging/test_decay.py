# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The schedules give the numbers that are in print, never leave [0, 1], and refuse settings that would."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.decay import ConstantDecay, HalfLifeDecay, PowerDecay, reference_decay, require_number

steps = st.integers(min_value=0, max_value=10**7)
powers = st.floats(min_value=0, max_value=8)


def test_three_schedules_are_in_print_under_one_formula():
    """At kappa 0.5, rho 10, gamma 2, tau 0, t 10: ours is 0.183, the offline code's 0.156, the online code's 2.0."""
    assert PowerDecay(0.5, lag=10, multiplier=2)(10) == pytest.approx(1 / math.sqrt(10 + 2 * 10), abs=1e-15)
    assert PowerDecay(0.5, lag=10, multiplier=2)(10) == pytest.approx(0.183, abs=5e-4)
    offline = reference_decay(0.5, lag=10, update_after=0, multiplier=2)
    assert offline(10) == pytest.approx(1 / math.sqrt(1 + 2 * (10 + 10)), abs=1e-15)
    assert offline(10) == pytest.approx(0.156, abs=5e-4)


@given(
    step=steps,
    power=powers,
    lag=st.floats(min_value=0, max_value=1e6),
    multiplier=st.floats(min_value=0, max_value=1e3),
    origin=st.integers(min_value=-100, max_value=10**6),
    min_age=st.integers(min_value=0, max_value=100),
    floor=st.floats(min_value=0, max_value=1),
)
def test_a_power_decay_lies_between_its_floor_and_one(step, power, lag, multiplier, origin, min_age, floor):
    """A weight above 1 is no average: the online code's 2.0 cannot be expressed, whatever the settings."""
    decay = PowerDecay(power, lag, multiplier, origin, min_age, floor)
    assert floor <= decay(step) <= 1


@given(step=steps, power=powers)
def test_a_power_decay_never_rises(step, power):
    decay = PowerDecay(power, lag=3, multiplier=0.25)
    assert decay(step + 1) <= decay(step)


@pytest.mark.parametrize(
    ('decay', 'step', 'value'),
    [
        (PowerDecay(0.5), 0, 10**-0.5),
        (PowerDecay(0.5), 6, 0.25),
        (PowerDecay(0.2), 22, 0.5),
        # A power of 0 is the constant 1, and a large one fades fast.
        (PowerDecay(0.0), 1000, 1.0),
        (PowerDecay(8.0), 90, 1e-16),
        (PowerDecay(1000.0), 90, 0.0),
        # gamma 0 never ages.
        (PowerDecay(0.5, lag=4, multiplier=0), 10**6, 0.5),
        # The base is below 1 (and even 0) at first, where the bare power would exceed 1 or divide by zero.
        (PowerDecay(0.5, lag=0, multiplier=0.25), 0, 1.0),
        (PowerDecay(0.5, lag=0, multiplier=0.25), 1, 1.0),
        (PowerDecay(0.5, lag=0, multiplier=0.25), 4, 1.0),
        (PowerDecay(0.5, lag=0, multiplier=0.25), 16, 0.5),
        (PowerDecay(0.5, lag=0, multiplier=0), 16, 1.0),
        # The floor takes over where the power falls below it: (10 + 15)^-0.5 = 0.2.
        (PowerDecay(0.5, floor=0.2), 14, 24**-0.5),
        (PowerDecay(0.5, floor=0.2), 16, 0.2),
        (PowerDecay(0.5, floor=1.0), 16, 1.0),
        # The age counts from the origin, and is never below min_age.
        (PowerDecay(0.5, origin=20), 26, 0.25),
        (PowerDecay(0.5, origin=20), 3, 10**-0.5),
        (PowerDecay(0.5, origin=20, min_age=6), 3, 0.25),
        (PowerDecay(0.5, origin=-6), 0, 0.25),
    ],
)
def test_power_decay_by_hand(decay, step, value):
    assert decay(step) == pytest.approx(value, rel=1e-15, abs=1e-300)


@pytest.mark.parametrize(
    ('settings', 'step', 'value'),
    [
        # (1 + 2 (10 - 0 + 10))^-0.5.
        ({'power': 0.5, 'lag': 10, 'update_after': 0, 'multiplier': 2}, 10, 1 / math.sqrt(41)),
        # By default gamma is 1: (1 + 14 - 4 + 5)^-0.5.
        ({'power': 0.5, 'lag': 5, 'update_after': 4}, 14, 0.25),
        # The age counts from tau, so that a run that is the same 1000 steps later has the same values.
        ({'power': 0.5, 'lag': 5, 'update_after': 1004}, 1014, 0.25),
        # The age is never below 1: at rho 0 the steps tau and tau + 1 are alike, (1 + 3)^-0.5, and so is all before.
        ({'power': 0.5, 'lag': 0, 'update_after': 20, 'multiplier': 3}, 0, 0.5),
        ({'power': 0.5, 'lag': 0, 'update_after': 20, 'multiplier': 3}, 20, 0.5),
        ({'power': 0.5, 'lag': 0, 'update_after': 20, 'multiplier': 3}, 21, 0.5),
        ({'power': 0.5, 'lag': 0, 'update_after': 20, 'multiplier': 3}, 25, 0.25),
        # A rho of 5 ends that 5 steps earlier.
        ({'power': 0.5, 'lag': 5, 'update_after': 20, 'multiplier': 3}, 16, 0.5),
        ({'power': 0.5, 'lag': 5, 'update_after': 20, 'multiplier': 3}, 20, 0.25),
        # The floor: (1 + 24)^-0.5 is 0.2.
        ({'power': 0.5, 'lag': 0, 'update_after': 0, 'floor': 0.2}, 23, 24**-0.5),
        ({'power': 0.5, 'lag': 0, 'update_after': 0, 'floor': 0.2}, 25, 0.2),
        # gamma 0 never ages, and a power of 0 is the constant 1.
        ({'power': 0.5, 'lag': 10, 'update_after': 0, 'multiplier': 0}, 100, 1.0),
        ({'power': 0.0, 'lag': 10, 'update_after': 0}, 100, 1.0),
    ],
)
def test_the_schedule_of_the_reference_by_hand(settings, step, value):
    assert reference_decay(**settings)(step) == pytest.approx(value, rel=1e-15)


def test_a_bad_setting_of_the_references_schedule_is_named():
    for settings, message in [
        ({'power': -0.5}, r'power must be at least 0 and finite, but is -0\.5\.'),
        ({'power': 0.5, 'multiplier': -1}, 'multiplier must be at least 0 and finite, but is -1'),
        ({'power': 0.5, 'floor': 1.5}, r'floor must be between 0 and 1, but is 1\.5\.'),
    ]:
        with pytest.raises(ValueError, match=f'^{message}'):
            reference_decay(lag=10, update_after=0, **settings)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'power': -0.5}, r'power must be at least 0 and finite, but is -0\.5\.'),
        ({'power': -1}, r'power must be at least 0 and finite, but is -1\.'),
        ({'power': math.nan}, 'power .* but is nan'),
        ({'power': math.inf}, 'power .* but is inf'),
        ({'power': 0.5, 'lag': -1}, 'lag .* but is -1'),
        ({'power': 0.5, 'lag': math.inf}, 'lag .* but is inf'),
        ({'power': 0.5, 'multiplier': -0.1}, 'multiplier .* but is -0.1'),
        ({'power': 0.5, 'floor': -0.1}, r'floor must be between 0 and 1, but is -0\.1\.'),
        ({'power': 0.5, 'floor': 2}, r'floor must be between 0 and 1, but is 2\.'),
        ({'power': 0.5, 'floor': 1.5}, r'floor .* but is 1.5'),
        ({'power': 0.5, 'floor': math.nan}, r'floor .* but is nan'),
    ],
)
def test_a_bad_power_decay_names_the_setting_and_its_value(settings, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        PowerDecay(**settings)


@pytest.mark.parametrize('value', ['0.5', None, True, 0.5j, [0.5], np.bool_(True)])
@pytest.mark.parametrize('name', ['power', 'lag', 'multiplier', 'floor', 'half_life', 'value'])
def test_what_is_no_number_is_named(name, value):
    """A truth value is one too: `half_life: true` in a recipe is a slip, and would be a half-life of 1."""
    make = {'half_life': HalfLifeDecay, 'value': ConstantDecay}.get(name, PowerDecay)
    settings = {name: value} if make is not PowerDecay else {'power': 0.5, name: value}
    with pytest.raises(TypeError, match=f'^{name} must be a number, but is ') as error:
        make(**settings)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize('number', [int, float, np.float32, np.float64, np.int64, Fraction])
def test_numbers_of_any_kind_are_numbers(number):
    assert HalfLifeDecay(number(1))(0, 1.0) == pytest.approx(0.5, rel=1e-7)
    assert PowerDecay(number(1), number(4), number(0), floor=number(0))(7) == 0.25
    assert ConstantDecay(number(1))(0, 1.0) == 1


@pytest.mark.parametrize(('at_most', 'good', 'bad'), [(1, (0, 0.5, 1), (-1e-9, 1.001)), (math.inf, (0, 1e300), (-1,))])
def test_the_bounds_of_a_number_belong_to_it(at_most, good, bad):
    for value in good:
        require_number('x', value, at_most)
    for value in (*bad, math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f'x must be .* but is {value}'):
            require_number('x', value, at_most)


# bema06 and bema09 have no bias correction, bema07 no EMA: there one of the two arrays is all nan.
@pytest.mark.parametrize('id', [f'bema{i:02}' for i in range(12)])
def test_the_offline_schedules_of_the_reference(golden, id):
    """The coefficients that the authors' own offline code used, which the paper's experiments were run with."""
    offline = golden('abblock_offline')
    settings, arrays = offline.configs[id]['kwargs'], offline.of(id)
    updated = arrays['updated']
    tau = settings['update_after']
    ema_tau = tau if settings['ema_update_after'] is None else settings['ema_update_after']
    compared = 0
    if 0 < settings['ema_power'] < 1:
        beta = reference_decay(
            settings['ema_power'],
            settings['scaling_lag'],
            ema_tau,
            settings['ema_gamma'],
            settings['min_ema_multiplier'],
        )
        expected = [beta(int(step)) for step in offline.arrays['steps'][updated]]
        np.testing.assert_allclose(expected, arrays['beta'][updated], rtol=0, atol=1e-12)
        compared += len(expected)
    if settings['eta_power'] >= 0:
        alpha = reference_decay(settings['eta_power'], settings['scaling_lag'], tau)
        expected = [alpha(int(step)) for step in offline.arrays['steps'][updated]]
        np.testing.assert_allclose(expected, arrays['alpha'][updated], rtol=0, atol=1e-12)
        compared += len(expected)
    assert compared >= 9


@pytest.mark.parametrize('half_life', [0.5, 1.0, 7.0, 1000.0])
def test_a_contribution_halves_in_a_half_life(half_life):
    decay = HalfLifeDecay(half_life)
    assert decay(0, half_life) == pytest.approx(0.5, rel=1e-15)
    assert decay(0, 2 * half_life) == pytest.approx(0.75, rel=1e-15)
    assert decay(123, half_life) == decay(0, half_life)
    assert decay(0, 0.0) == 0


def test_a_long_half_life_keeps_its_digits():
    """1 - 2^-x loses every digit to cancellation where x is tiny; the first term of its series is x ln 2."""
    assert HalfLifeDecay(1e17)(0, 1.0) == pytest.approx(math.log(2) * 1e-17, rel=1e-15, abs=0)


@given(half_life=st.floats(min_value=1e-6, max_value=1e6), one=st.floats(0, 1e3), other=st.floats(0, 1e3))
def test_two_half_life_updates_forget_as_much_as_one_of_their_length(half_life, one, other):
    decay = HalfLifeDecay(half_life)
    kept = (1 - decay(0, one)) * (1 - decay(0, other))
    assert kept == pytest.approx(1 - decay(0, one + other), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('id', [f'alg{i:02}' for i in range(11) if i not in (6, 7)])
def test_the_half_life_of_composers_ema(golden, id):
    """Where Composer derives smoothing from half-life and interval (alg06, alg07 give it), beta is 1 - smoothing."""
    ema = golden('composer_ema')
    settings = ema.configs[id]['kwargs']
    # Composer's default interval follows from the half-life, and is one batch for 10 of them.
    interval = 1 if settings['update_interval'] is None else int(settings['update_interval'].removesuffix('ba'))
    beta = HalfLifeDecay(float(settings['half_life'].removesuffix('ba')))(0, interval)
    assert beta == pytest.approx(1 - ema.of(id)['smoothing'].item(), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ('half_life', 'bounds'),
    [
        (0, 'positive'),
        (0.0, 'positive'),
        (-1, 'at least 0 and finite'),
        (math.inf, 'at least 0 and finite'),
        (math.nan, 'at least 0 and finite'),
    ],
)
def test_a_bad_half_life_is_named(half_life, bounds):
    with pytest.raises(ValueError, match=f'^half_life must be {bounds}, but is {half_life:g}'):
        HalfLifeDecay(half_life)


def test_a_constant_decay_is_constant():
    assert [ConstantDecay(0.01)(step, elapsed) for step, elapsed in ((0, 1.0), (10, 400.0))] == [0.01, 0.01]
    assert ConstantDecay(1)(5, 1.0) == 1
    assert ConstantDecay(0)(5, 1.0) == 0


@pytest.mark.parametrize('value', [-0.1, 1.01, math.inf, math.nan])
def test_a_bad_constant_is_named(value):
    with pytest.raises(ValueError, match=f'^value must be between 0 and 1, but is {value}'):
        ConstantDecay(value)
