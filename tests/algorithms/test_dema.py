# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""DEMA in a real Trainer against the numbers of the paper's code."""

import numpy as np
import pytest

from composer_bema import DEMA
from tests.algorithms.runs import TRAINABLE, follow


@pytest.mark.parametrize('id', ['dema00', 'dema03', 'dema04'])
def test_trainer_reproduces_the_papers_code(golden, id):
    """Those that start before the first step: there 1 + gamma (t + rho) is our lag + multiplier t."""
    config, expected = golden('abblock_offline').configs[id]['kwargs'], golden('abblock_offline').of(id)
    gamma, rho = config['ema_gamma'], config['scaling_lag']
    dema = DEMA('5ba', '0ba', config['ema_power'], 1 + gamma * rho, gamma, config['min_ema_multiplier'])
    seen = follow(golden('trajectory').arrays, dema)
    steps = golden('abblock_offline').arrays['steps'].tolist()
    assert dema.average.num_updates == len(steps) == 12
    for row, step in enumerate(steps):
        for name in TRAINABLE:
            np.testing.assert_allclose(seen[step][name], expected[f'running/{name}'][row], atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: DEMA(ema_power=None), 'DEMA is an average of EMAs: give ema_power, half_life or smoothing'),
        (lambda: DEMA(half_life='10ba', smoothing=0.9), 'give one of them'),
        (lambda: DEMA('10ba', update_interval='10ba'), 'update_freq and update_interval are two names'),
    ],
)
def test_bad_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_defaults():
    assert DEMA().update_freq.to_timestring() == '400ba'
    assert DEMA(half_life='1000ba').update_freq.to_timestring() == '1ba'
    assert DEMA(smoothing=0.9).update_freq.to_timestring() == '1ba'
