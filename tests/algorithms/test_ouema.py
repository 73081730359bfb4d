# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""OUEMA in a real Trainer: its alpha counts from the burn-in, whenever that comes."""

import numpy as np
import pytest
from composer.loggers import InMemoryLogger

from composer_bema import OUEMA
from tests.algorithms.runs import TRAINABLE, follow, make_trainer


def reference(trajectory, steps, tau, eta, kappa, rho):
    """The average after each of the steps, in float64 and straight from the formulas."""
    average, averages = trajectory[tau], []
    for t in steps:
        alpha, beta = (1 + max(t - tau + rho, 1)) ** -eta, (rho + t) ** -kappa
        average = (1 - beta) * average + beta * (trajectory[t] - alpha * trajectory[tau]) / (1 - alpha)
        averages.append(average)
    return averages


@pytest.mark.parametrize(('update_after', 'tau'), [('0ba', 0), ('7ba', 7), ('0.25dur', 15)])
def test_trainer_follows_the_formulas(golden, update_after, tau):
    trajectory = golden('trajectory').arrays
    ouema = OUEMA('4ba', update_after, ema_power=0.6, bias_power=0.7, lag=2)
    seen = follow(trajectory, ouema)
    steps = list(range(tau + 4, 61, 4))
    assert list(seen) == list(range(tau + 4, 61))
    for name in TRAINABLE:
        expected = reference(trajectory[name].astype(np.float64), steps, tau, 0.7, 0.6, 2)
        for step, average in zip(steps, expected, strict=True):
            np.testing.assert_allclose(seen[step][name], average, atol=5e-6, rtol=0)


def alphas(*runs):
    """Alpha at the updates of one fit after the other, by their number and step."""
    logger = InMemoryLogger()
    trainer = make_trainer(OUEMA('3ba', '2ba', bias_power=0.5), max_duration='8ba', loggers=[logger])
    trainer.fit()
    for run in runs:
        trainer.fit(**run)
    trainer.close()
    return {(row, t.batch.value): value for row, (t, value) in enumerate(logger.data['ouema/alpha'])}


def test_alpha_counts_from_where_the_clocks_are_set_back_to():
    age = 1 + 10
    first = {(0, 5): (age + 3) ** -0.5, (1, 8): (age + 6) ** -0.5}
    assert alphas() == pytest.approx(first)
    again = {(2, 3): (age + 3) ** -0.5, (3, 6): (age + 6) ** -0.5}
    assert alphas({'duration': '6ba', 'reset_time': True}) == pytest.approx({**first, **again})


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: OUEMA(bias_power=0), 'bias_power must be positive, but is 0, which would divide by zero'),
        (lambda: OUEMA(bias_power=-1), 'bias_power must be at least 0'),
        (lambda: OUEMA(half_life='0ba'), 'half_life must be positive'),
    ],
)
def test_bad_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_a_correction_it_is_the_ema():
    assert OUEMA(bias_power=None).average.rule.average == 'ema'
