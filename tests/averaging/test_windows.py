# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Windows are the means that they say they are: by hand, of merged decays, and by the numbers of published code."""

import math
from collections.abc import Callable, Iterable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.coefficients import fold
from composer_bema.averaging.rules import THETA, Latest, Rule
from composer_bema.averaging.windows import DecayShape, SWAWindow, Window, merge_weights, require_count, swa_window_rule
from tests.averaging.reference import apply_rows

NAMES = ('a', 'b', 'c', 'f', 'r')
LAWA_IDS = [f'l{i:02}' for i in range(3)]
AVERAGER_IDS = [f'wa{i:02}' for i in range(4)]
# w(u), by which a decay of the learning rate multiplies the steps at u of its way.
MULTIPLIERS: dict[str, Callable[[float], float]] = {
    'linear': lambda u: 1 - u,
    '1-sqrt': lambda u: 1 - math.sqrt(u),
    'cosine': lambda u: (1 + math.cos(math.pi * u)) / 2,
}

shapes = st.sampled_from(get_args(DecayShape))


def follow(rule: Rule, start: Any, thetas: Iterable[Any]) -> list[dict[str, Any]]:
    """The buffers after each update; windows count updates, so that the steps are of no matter."""
    values, history = dict.fromkeys(rule.buffers, start), []
    for index, theta in enumerate(thetas):
        values[THETA] = theta
        apply_rows(rule.linear_step(0, 1.0, index), values)
        history.append(dict(values))
    return history


# ------------------------------------------------------------------------------------------------- weights of a merge


@pytest.mark.parametrize(
    ('decay', 'weights'),
    [
        ('linear', [1.0]),
        ('linear', [0.5, 0.5]),
        ('linear', [0.2, 0.2, 0.2, 0.2, 0.2]),
        ('1-sqrt', [1.0]),
        # w is 1 - sqrt(j / 4): 1, 1/2, 1 - sqrt(1/2), 1 - sqrt(3/4), and 0 behind the last; c_j = w_j - w_(j+1).
        ('1-sqrt', [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
        ('cosine', [1.0]),
        ('cosine', [0.5, 0.5]),
        # w is (1 + cos(j pi / 3)) / 2: 1, 3/4, 1/4, and 0.
        ('cosine', [0.25, 0.5, 0.25]),
        # w is 1, (1 + sqrt(1/2)) / 2, 1/2, (1 - sqrt(1/2)) / 2, and 0.
        (
            'cosine',
            [(1 - math.sqrt(0.5)) / 2, math.sqrt(0.5) / 2, math.sqrt(0.5) / 2, (1 - math.sqrt(0.5)) / 2],
        ),
    ],
)
def test_the_weights_of_a_merge_by_hand(decay, weights):
    assert merge_weights(decay, len(weights)) == pytest.approx(weights, rel=0, abs=1e-15)


@given(decay=shapes, count=st.integers(min_value=1, max_value=200))
def test_the_weights_of_a_merge_are_those_of_a_mean(decay, count):
    weights = merge_weights(decay, count)
    assert len(weights) == count
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert min(weights) > 0


@given(count=st.integers(min_value=1, max_value=200))
def test_a_linear_decay_is_the_plain_mean(count):
    assert merge_weights('linear', count) == pytest.approx([1 / count] * count, rel=0, abs=1e-15)


@given(decay=shapes, thetas=st.lists(st.floats(min_value=-100, max_value=100), min_size=1, max_size=20))
def test_a_merge_stands_for_a_decay_of_the_learning_rate(decay, thetas):
    """The mean, sum_j c_j theta_j, is where shrunken steps lead: theta_0 + sum_j w_j (theta_j - theta_(j-1))."""
    count = len(thetas)
    merged = sum(c * theta for c, theta in zip(merge_weights(decay, count), thetas, strict=True))
    decayed = thetas[0]
    for j in range(1, count):
        decayed += MULTIPLIERS[decay](j / count) * (thetas[j] - thetas[j - 1])
    assert merged == pytest.approx(decayed, rel=0, abs=1e-11)


def test_every_shape_of_a_decay_is_tested():
    assert set(MULTIPLIERS) == set(get_args(DecayShape))


# ----------------------------------------------------------------------------------------------------- newest snapshots


def test_a_window_of_two_by_hand():
    """The oldest snapshot gives its place to the newest; the weights at the start (100) are no snapshot."""
    history = follow(Window(2), 100.0, [8.0, 16.0, 4.0, 2.0])
    assert [values['window'] for values in history] == [8, (8 + 16) / 2, (16 + 4) / 2, (4 + 2) / 2]
    assert [values['snapshot_0'] for values in history] == [8, 8, 4, 4]
    assert [values['snapshot_1'] for values in history] == [100, 16, 16, 2]


def test_a_weighted_window_by_hand():
    """A cosine weighs one snapshot 1, two 1/2 each, and three 1/4, 1/2, 1/4, in the order of their age."""
    averages = [values['window'] for values in follow(Window(3, 'cosine'), 100.0, [4.0, 8.0, 16.0, 0.0, 4.0])]
    assert averages == pytest.approx([4, 2 + 4, 1 + 4 + 4, 2 + 8 + 0, 4 + 0 + 1], rel=0, abs=1e-14)


@given(decay=shapes, size=st.integers(min_value=1, max_value=6), updates=st.integers(min_value=1, max_value=15))
def test_a_window_weighs_its_snapshots_as_a_merge_does(decay, size, updates):
    """Of as many as there are before it is full, and of the newest `size` then, wherever in the buffers they lie."""
    held = min(size, updates)
    expected = [0.0] * (updates + 1 - held) + merge_weights(decay, held)
    row = fold(Window(size, decay), 0, range(1, updates + 1))[-1]
    np.testing.assert_allclose(row, expected, rtol=0, atol=1e-14)


def test_the_buffers_of_a_window():
    """These names reach checkpoints; every snapshot costs a copy of the weights."""
    assert Window(2).buffers == ('snapshot_0', 'snapshot_1', 'window')
    assert (Window(2).constants, Window(2).average) == ((), 'window')
    assert Window(3) == Window(3, 'linear') != Window(3, 'cosine')


# ----------------------------------------------------------------------------------------------------- means of periods


def test_a_period_of_two_updates_by_hand():
    """The running mean starts again at every second update; the average stands still until a period is whole."""
    history = follow(SWAWindow(2), 100.0, [8.0, 16.0, 4.0, 2.0, 10.0])
    assert [values['running'] for values in history] == [8, (8 + 16) / 2, 4, (4 + 2) / 2, 10]
    assert [values['swa'] for values in history] == [8, 12, 12, 3, 3]


def test_the_last_two_periods_by_hand():
    """The periods' means are 12, 3 and 15. The third takes the place of the first, and the average is of 3 and 15."""
    history = follow(SWAWindow(2, periods=2), 100.0, [8.0, 16.0, 4.0, 2.0, 10.0, 20.0])
    assert [values['swa'] for values in history] == [8, 12, 12, (12 + 3) / 2, 7.5, (15 + 3) / 2]
    assert (history[-1]['period_0'], history[-1]['period_1']) == (15, 3)


@given(
    updates=st.integers(min_value=1, max_value=5),
    periods=st.integers(min_value=1, max_value=4),
    count=st.integers(min_value=1, max_value=40),
)
def test_the_average_of_periods_is_the_mean_of_their_weights(updates, periods, count):
    """All weights of the newest whole periods, equally; of what there is until the first one ends."""
    whole = count // updates
    newest = whole * updates if whole else count
    oldest = max(whole - periods, 0) * updates
    expected = np.zeros(count + 1)
    expected[1 + oldest : 1 + newest] = 1 / (newest - oldest)
    row = fold(SWAWindow(updates, periods), 0, range(1, count + 1))[-1]
    np.testing.assert_allclose(row, expected, rtol=0, atol=1e-14)


def test_the_buffers_of_periods():
    rule = SWAWindow(5, periods=2)
    assert rule.buffers == ('running', 'period_0', 'period_1', 'swa')
    assert (rule.constants, rule.average) == ((), 'swa')
    assert SWAWindow(5) == SWAWindow(5, periods=1)


# ----------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize('rule', [Window(1), Window(1, 'cosine'), SWAWindow(1)])
def test_a_window_of_one_is_the_newest_weights(rule):
    np.testing.assert_array_equal(fold(rule, 0, [3, 4, 9]), fold(Latest(), 0, [3, 4, 9]))


@pytest.mark.parametrize('rule', [Window(3), Window(3, '1-sqrt'), SWAWindow(3, 2)])
def test_batch_statistics_follow_the_window_too(rule):
    """Its weights are never negative, so a variance stays positive."""
    assert rule.statistics == rule


def test_what_their_buffers_are_laid_out_for():
    assert Window(3, 'cosine').layout == {'window': 3}
    assert SWAWindow(3, 2).layout == {'updates in a period': 3, 'periods': 2}
    assert Latest().layout == {}


@pytest.mark.parametrize(
    ('steps', 'message'),
    [
        ((4, 0), 'update_freq must be at least 1, but is 0'),
        ((0, 1), 'horizon must be at least 1'),
        ((4, 3), 'horizon is 4, which is no multiple of the 3 steps'),
        ((12, 2, 3), 'period is 3, which is no multiple of the 2 steps'),
        ((10, 2, 4), 'horizon is 10, which is no multiple of period, 4'),
    ],
)
def test_steps_that_make_no_whole_periods(steps, message):
    with pytest.raises(ValueError, match=message):
        swa_window_rule(*steps)
    assert swa_window_rule(12, 2, 4) == SWAWindow(2, 3)


@pytest.mark.parametrize('rule', [Window(3), SWAWindow(3, 2)])
def test_a_window_knows_nothing_of_the_step(rule):
    assert rule.linear_step(7, 1.0, 4) == rule.linear_step(10**6, 400.0, 4)
    assert rule.linear_step(7, 1.0, 4).coefficients == {}


@pytest.mark.parametrize(
    ('name', 'make'),
    [
        ('window', Window),
        ('updates', SWAWindow),
        ('periods', lambda periods: SWAWindow(2, periods)),
        ('n', lambda n: require_count('n', n)),
    ],
)
def test_a_count_out_of_its_range_is_an_error_that_names_it(name, make):
    """A truth value is no count, and neither is `'3ba'`, which a recipe might say."""
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf'^{name} must be at least 1, but is {value}\.$'):
            make(value)
    for value in (True, False, 2.0, '3ba', None):
        with pytest.raises(TypeError, match=f'^{name} must be a whole number, but is {value!r}\\.$'):
            make(value)
    make(1)


@pytest.mark.parametrize('decay', ['sqrt', 'Linear', '', None])
def test_an_unknown_decay_is_an_error_that_lists_the_known_ones(decay):
    with pytest.raises(ValueError, match=f'^decay must be one of linear, 1-sqrt, cosine, but is {decay!r}\\.$'):
        Window(3, decay)


# ------------------------------------------------------------------------------------------------------- golden numbers


def test_all_golden_numbers_are_used(golden):
    assert list(golden('lawa').configs) == LAWA_IDS
    assert [id for id in golden('epfml').configs if id.startswith('wa')] == AVERAGER_IDS


@pytest.mark.parametrize('id', LAWA_IDS)
def test_a_window_gives_lawas_averages(golden, id):
    """The authors' mean of the last checkpoints, from the first full window on."""
    lawa, trajectory = golden('lawa'), golden('trajectory').arrays
    config, arrays = lawa.configs[id], lawa.of(id)
    steps = list(range(config['every'], len(trajectory['steps']), config['every']))
    rows = fold(Window(config['last']), 0, steps)[config['last'] - 1 :]
    assert steps[config['last'] - 1 :] == arrays['steps'].tolist()
    for name in NAMES:
        weights = trajectory[name][[0, *steps]].astype(np.float64)
        np.testing.assert_allclose(np.tensordot(rows, weights, 1), arrays[f'avg/{name}'], rtol=0, atol=5e-6)


@pytest.mark.parametrize('id', AVERAGER_IDS)
def test_periods_give_the_weight_averagers_means(golden, id):
    """Its running mean after every sample, what it saves when a horizon ends, and `get_latest_like`: the last saved."""
    epfml, trajectory = golden('epfml'), golden('trajectory').arrays
    settings, arrays = epfml.configs[id]['kwargs'], epfml.of(id)
    in_a_period = settings['horizon'] // settings['interval']
    samples, saved = arrays['updates'], arrays['saved_counts']
    for name in NAMES:
        weights = trajectory[name].astype(np.float64)
        history = follow(SWAWindow(in_a_period), weights[0], weights[samples])
        running = np.stack([values['running'] for values in history])
        np.testing.assert_allclose(running, arrays[f'module/{name}'], rtol=0, atol=5e-6)
        averages = np.stack([values['swa'] for values in history])
        ends = averages[in_a_period - 1 :: in_a_period]
        assert len(ends) == len(saved) == len(trajectory['steps']) // settings['horizon']
        np.testing.assert_allclose(ends, arrays[f'saved/{name}'], rtol=0, atol=5e-6)
        for step in epfml.configs[id]['sweeps_at']:
            latest = averages[np.flatnonzero(samples <= step)[-1]]
            np.testing.assert_allclose(latest, arrays[f'latest_at{step}/{name}'][0], rtol=0, atol=5e-6)


@pytest.mark.parametrize('id', AVERAGER_IDS)
def test_periods_give_the_weight_averagers_sweep_of_horizons(golden, id):
    """The mean of the last n + 1 horizons that are over is that of as many periods."""
    epfml, trajectory = golden('epfml'), golden('trajectory').arrays
    settings, arrays = epfml.configs[id]['kwargs'], epfml.of(id)
    for step in epfml.configs[id]['sweeps_at']:
        samples = arrays['updates'][arrays['updates'] <= step].tolist()
        horizons = arrays[f'sweep_at{step}/horizons']
        assert horizons.tolist() == list(range(settings['horizon'], step + 1, settings['horizon']))
        for n, horizon in enumerate(horizons):
            assert horizon == (n + 1) * settings['horizon']
            rule = SWAWindow(settings['horizon'] // settings['interval'], periods=n + 1)
            row = fold(rule, 0, samples)[-1]
            for name in NAMES:
                weights = trajectory[name][[0, *samples]].astype(np.float64)
                average = np.tensordot(row, weights, 1)
                np.testing.assert_allclose(average, arrays[f'sweep_at{step}/{name}'][n], rtol=0, atol=5e-6)
