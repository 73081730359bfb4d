# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What past steps weigh in a run's averages, from settings and metrics alone."""

import numpy as np
import pytest

from composer_bema.algorithms import BEMA, EMA, LAWA, SWAWindow
from composer_bema.averaging.coefficients import fold
from composer_bema.averaging.rules import bema_rule, ema_rule
from composer_bema.training.weighing import Clock, weigh


def clock(steps=20, steps_per_epoch=5, tokens=100, first=0, max_duration='20ba'):
    """The clock of a run that logs its time as each step begins, and at its end."""
    times = [(step, step // steps_per_epoch) for step in range(first, steps + 1)]
    return Clock(
        [{'batch': b, 'epoch': e, 'token': tokens * b, 'time/sample': 4 * b} for b, e in times],
        max_duration,
    )


def updates(average, steps, elapsed=None):
    """What the algorithm logs at these steps."""
    logged = {}
    for index, step in enumerate(steps):
        linear_step = average.average.rule.linear_step(step, (elapsed or [1.0] * len(steps))[index], index)
        logged[step] = {**linear_step.coefficients, 'num_updates': index + 1}
    return logged


def test_the_weights_are_those_of_the_offline_fold():
    average = BEMA(update_freq='3ba', update_after='2ba')
    weighing = weigh(average, updates(average, [5, 8, 11]), clock())
    assert weighing.steps == [2, 5, 8, 11]
    np.testing.assert_allclose(weighing.coefficients, fold(bema_rule(), 2, [5, 8, 11])[-1], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ('half_life', 'in_steps'), [('4ba', 4), ('400tok', 4), ('16sp', 4), ('1ep', 5), ('2ep', 10), ('0.3dur', 6)]
)
def test_half_lives_are_counted_in_their_units(half_life, in_steps):
    average = EMA(half_life=half_life, update_freq='2ba')
    logged = updates(average, [2, 4, 6], [2 / in_steps] * 3)
    weighing = weigh(average, logged, clock())
    expected = fold(ema_rule(half_life=in_steps), 0, [2, 4, 6])[-1]
    np.testing.assert_allclose(weighing.coefficients, expected, rtol=0, atol=1e-15)
    # Half of the start is left after a half-life.
    assert weighing.coefficients[0] == pytest.approx(2 ** (-6 / in_steps))


@pytest.mark.parametrize(
    ('update_after', 'start'),
    [('0ba', 0), ('7ba', 7), ('750tok', 8), ('700tok', 7), ('27sp', 7), ('1ep', 5), ('0.35dur', 7)],
)
def test_the_start_is_the_first_step_at_which_the_burn_in_is_over(update_after, start):
    average = EMA(smoothing=0.5, update_after=update_after)
    assert weigh(average, updates(average, [9, 10]), clock()).steps == [start, 9, 10]


def test_windows_need_no_clock():
    lawa = LAWA(update_freq='1ba', window=2)
    np.testing.assert_array_equal(weigh(lawa, updates(lawa, [1, 2, 3]), clock()).coefficients, [0, 0, 0.5, 0.5])
    swa = SWAWindow(update_freq='1ba', horizon='2ba')
    np.testing.assert_array_equal(weigh(swa, updates(swa, [1, 2, 3]), clock()).coefficients, [0, 0.5, 0.5, 0])


def test_a_run_that_went_on_from_a_checkpoint_without_its_average_starts_there():
    average = EMA(smoothing=0.5)
    assert weigh(average, updates(average, [9, 10]), clock(first=8)).steps == [8, 9, 10]


@pytest.mark.parametrize(
    ('average', 'run', 'changes', 'reason'),
    [
        (EMA(smoothing=0.5), {}, {8: {'num_updates': 4, 'beta': 0.5}}, 'some of its updates are not in these metrics'),
        (EMA(smoothing=0.5), {}, {6: {'num_updates': 2, 'beta': 0.25}}, 'the beta that it logged at step 6 is not'),
        (EMA(smoothing=0.5, update_after='9ba'), {}, {}, 'its first update, at step 4, is not after step 9'),
        (EMA(smoothing=0.5, update_after='9000tok'), {}, {}, "at which step '9000tok' had come"),
        (EMA(half_life='1ep', update_freq='2ba'), {'steps_per_epoch': 50}, {}, 'how many steps an epoch has'),
    ],
    ids=['updates missing', 'other settings', 'late start', 'no such time', 'no epoch'],
)
def test_what_cannot_be_told_has_a_reason(average, run, changes, reason):
    logged = updates(average, [4, 6], [0.5, 0.5]) | changes
    with pytest.raises(ValueError, match=reason):
        weigh(average, logged, clock(**run))


def test_a_clock_that_was_not_logged_is_named():
    average = EMA(half_life='400tok', update_freq='2ba')
    silent = Clock([{'batch': step, 'epoch': 0} for step in range(7)], '6ba')
    with pytest.raises(ValueError, match='do not say what the run had counted in tokens at step 0'):
        weigh(average, updates(average, [4, 6], [0.5, 0.5]), silent)
