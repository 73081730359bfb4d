# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Which checkpoints make up an average: the updates that are taken, and rows over all checkpoints, by hand."""

import logging

import numpy as np
import pytest

from composer_bema.offline.plan import plan_averages, weight_curves, weight_table
from composer_bema.offline.settings import Setting

# Of the EMA 3/4 stay at each update.
EMA = {'smoothing': 0.75}
# Without an EMA and with a correction that does not fade BEMA is 2 theta_t - theta_0.
CORRECTION = {'ema_power': None, 'bias_power': 0}


def rows_of(averages):
    return [average.coefficients.tolist() for average in averages]


# Which updates are taken


@pytest.mark.parametrize(
    ('update_freq', 'update_after', 'steps', 'row'),
    [
        # All that come after the first one.
        (None, 0, [0, 1, 2], [9 / 16, 3 / 16, 1 / 4]),
        # Uneven steps are as good.
        (None, 0, [0, 3, 10], [9 / 16, 3 / 16, 1 / 4]),
        # All that come after tau, and nothing before it.
        (None, 4, [0, 2, 4, 6, 8], [0, 0, 9 / 16, 3 / 16, 1 / 4]),
        # Every fourth step from tau on; the others weigh nothing.
        (4, 0, [0, 2, 4, 6, 8], [9 / 16, 0, 3 / 16, 0, 1 / 4]),
        (4, 2, [0, 2, 4, 6, 8, 10], [0, 9 / 16, 0, 3 / 16, 0, 1 / 4]),
        # The last checkpoint is none of them.
        (4, 0, [0, 2, 4, 6], [3 / 4, 0, 1 / 4, 0]),
        # Steps that are more often than checkpoints: all that are there.
        (1, 5, [5, 6, 7], [9 / 16, 3 / 16, 1 / 4]),
    ],
)
def test_the_updates_and_what_the_checkpoints_weigh(update_freq, update_after, steps, row, caplog):
    [average] = plan_averages(Setting('ema', EMA, update_freq, update_after), steps)
    assert average.step == max(step for step, weight in zip(steps, row, strict=True) if weight)
    assert average.coefficients.dtype == average.statistics.dtype == np.float64
    np.testing.assert_allclose(average.coefficients, row, rtol=0, atol=1e-15)
    np.testing.assert_allclose(average.statistics, row, rtol=0, atol=1e-15)
    assert not caplog.records


def test_missing_updates_are_told_and_passed_over(caplog):
    setting = Setting('ema', EMA, update_freq=2, update_after=2)
    with caplog.at_level(logging.WARNING):
        [average] = plan_averages(setting, [0, 2, 6, 7, 12])
    assert average.coefficients.tolist() == [0, 9 / 16, 3 / 16, 0, 1 / 4]
    assert caplog.messages == [
        'ema smoothing=0.75 update_freq=2 update_after=2: there are no checkpoints of the steps 4, 8, 10; '
        'it goes on without.'
    ]


def test_of_many_missing_updates_a_few_are_listed(caplog):
    with caplog.at_level(logging.WARNING):
        plan_averages(Setting('ema', EMA, update_freq=1), [0, 1, 20])
    assert '2, 3, 4, 5, 6, ..., 15, 16, 17, 18, 19;' in caplog.text


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        (Setting('ema', update_freq=5), r'of those of the steps 0, 2, 4, is a multiple of 5 steps after 0\.$'),
        (Setting('ema', update_after=4), r'of those of the steps 0, 2, 4, is after step 4\.$'),
    ],
)
def test_an_average_needs_an_update(setting, message):
    with pytest.raises(ValueError, match=f'^{setting} has no update: no checkpoint, {message}'):
        plan_averages(setting, [0, 2, 4])


# Where it starts


def test_theta_0_weighs_in_the_checkpoint_of_tau():
    """2 theta_t - theta_0: by hand, and the statistics are those of the EMA, which is theta_t."""
    setting = Setting('bema', CORRECTION, update_after=2)
    averages = plan_averages(setting, [0, 2, 4, 6], [4, 6])
    assert rows_of(averages) == [[0, -1, 2, 0], [0, -1, 0, 2]]
    assert [average.statistics.tolist() for average in averages] == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_the_statistics_are_averaged_by_the_rules_own_coefficients_for_them():
    """BEMA with its defaults: beta = (10 + t)^-0.5 is 1/4 at step 6, and alpha = (10 + t)^-0.2."""
    [average] = plan_averages(Setting('bema'), [0, 6])
    alpha = 16**-0.2
    np.testing.assert_allclose(average.coefficients, [3 / 4 - alpha, 1 / 4 + alpha], rtol=0, atol=1e-15)
    np.testing.assert_allclose(average.statistics, [3 / 4, 1 / 4], rtol=0, atol=1e-15)


def test_without_the_weights_before_the_first_step_the_way_out_is_named():
    with pytest.raises(ValueError, match=r'name them as the initial model \(--initial-model\), or start later') as info:
        plan_averages(Setting('ema'), [2, 4])
    assert '(--update-after 2)' in str(info.value)


def test_an_average_starts_from_a_checkpoint():
    with pytest.raises(ValueError, match='starts from the weights at step 3, .*: update_after must be one of 2, 4, 6'):
        plan_averages(Setting('ema', update_after=3), [2, 4, 6])


@pytest.mark.parametrize(
    'setting',
    [Setting('lawa', {'window': 2}), Setting('ema', {'ema_power': None}), Setting('swa_window', {'horizon': 2})],
)
def test_what_forgets_its_start_needs_none(setting):
    [average] = plan_averages(setting, [2, 4])
    assert average.coefficients.sum() == 1
    [later] = plan_averages(Setting(setting.rule, setting.options, update_after=3), [2, 4])
    assert later.coefficients.tolist() == [0, 1]


# Averages of several steps


def test_several_averages_of_a_trajectory():
    averages = plan_averages(Setting('ema', EMA), [0, 1, 2, 3], [2, 1])
    assert [average.step for average in averages] == [2, 1]
    assert rows_of(averages) == [[9 / 16, 3 / 16, 1 / 4, 0], [3 / 4, 1 / 4, 0, 0]]
    # A step is the last one by default.
    assert [average.step for average in plan_averages(Setting('ema', EMA), [0, 1, 2, 3])] == [3]


@pytest.mark.parametrize('at', [0, 3, 8])
def test_an_average_is_of_an_update(at):
    with pytest.raises(ValueError, match=f'ema update_freq=2 has no update at step {at}, but at 2, 4, 6'):
        plan_averages(Setting('ema', update_freq=2), [0, 2, 3, 4, 6], [2, at])


# Windows


@pytest.mark.parametrize(
    ('setting', 'row'),
    [
        (Setting('lawa', {'window': 2}), [0, 0, 0, 1 / 2, 1 / 2]),
        (Setting('lawa', {'window': 2}, update_freq=4), [0, 0, 1 / 2, 0, 1 / 2]),
        (Setting('decay_merge', {'window': 4, 'decay': '1-sqrt'}), [0, 1 / 2, *(np.diff(np.sqrt([1, 2, 3, 4])) / 2)]),
        # One period is 4 steps, which are 2 updates.
        (Setting('swa_window', {'horizon': 4}), [0, 0, 0, 1 / 2, 1 / 2]),
        (Setting('swa_window', {'horizon': 8, 'period': 4}), [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        # Of the third period there is half.
        (Setting('swa_window', {'horizon': 4}, update_after=2), [0, 0, 1 / 2, 1 / 2, 0]),
    ],
)
def test_windows_by_hand(setting, row, caplog):
    [average] = plan_averages(setting, [0, 2, 4, 6, 8])
    np.testing.assert_allclose(average.coefficients, row, rtol=0, atol=1e-15)
    assert not caplog.records


def test_a_window_that_is_not_full_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        averages = plan_averages(Setting('lawa', {'window': 3}), [2, 4, 6], [4, 6])
    np.testing.assert_allclose(rows_of(averages), [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=0, atol=1e-15)
    assert caplog.messages == ['lawa window=3 at step 4: its window is not full, and holds 2 checkpoints.']


@pytest.mark.parametrize(
    ('steps', 'update_freq'),
    # The start is no update if there are several, and one if there is one.
    [([100, 102, 104], None), ([2], None), ([2, 3, 4, 5, 6], 2)],
)
def test_periods_are_of_the_spacing_of_the_updates(steps, update_freq):
    """Two steps from one update to the next: 2 is a period, and 3 is none."""
    plan_averages(Setting('swa_window', {'horizon': 2}, update_freq), steps)
    with pytest.raises(ValueError, match='horizon is 3, which is no multiple of the 2 steps between two updates'):
        plan_averages(Setting('swa_window', {'horizon': 3}, update_freq), steps)


def test_periods_with_a_gap_are_refused():
    """A period that counts four steps would reach over six."""
    setting = Setting('swa_window', {'horizon': 4}, update_freq=2)
    with pytest.raises(ValueError, match='there are no checkpoints of the steps 6: start after them, or take lawa'):
        plan_averages(setting, [2, 4, 8, 10])


def test_a_horizon_longer_than_the_run_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        plan_averages(Setting('swa_window', {'horizon': 8, 'period': 4}), [2, 4, 6])
    assert caplog.messages == [
        'swa_window horizon=8 period=4 at step 6: its window is not full, and holds 3 checkpoints.'
    ]


def test_a_step_that_is_named_twice_is_one(caplog):
    assert [average.step for average in plan_averages(Setting('lawa', {'window': 1}), [2, 4], [4, 2, 4])] == [4, 2]


def test_periods_of_uneven_steps_are_refused():
    with pytest.raises(ValueError, match='swa_window needs checkpoints that are evenly spaced'):
        plan_averages(Setting('swa_window', {'horizon': 4}), [2, 4, 7])


# Tables and curves


def test_tables_and_curves_have_the_same_names_and_numbers():
    steps = [0, 1, 2]
    one = [*plan_averages(Setting('ema', EMA), steps), *plan_averages(Setting('lawa', {'window': 2}), steps)]
    assert weight_table(one, steps) == {
        'step': [0, 1, 2],
        'ema smoothing=0.75': [9 / 16, 3 / 16, 1 / 4],
        'lawa window=2': [0, 1 / 2, 1 / 2],
    }
    assert weight_curves(one, steps) == {
        'ema smoothing=0.75': [(0, 9 / 16), (1, 3 / 16), (2, 1 / 4)],
        'lawa window=2': [(0, 0), (1, 1 / 2), (2, 1 / 2)],
    }


def test_names_tell_steps_apart_where_there_are_several():
    steps = [0, 1, 2]
    averages = plan_averages(Setting('ema', EMA), steps, [1, 2])
    names = ['ema smoothing=0.75, step 1', 'ema smoothing=0.75, step 2']
    assert list(weight_table(averages, steps)) == ['step', *names]
    assert list(weight_curves(averages, steps)) == names
