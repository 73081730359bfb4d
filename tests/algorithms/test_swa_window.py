# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""SWAWindow in a real Trainer against the published weight averager, and in time strings."""

import numpy as np
import pytest
import torch

from composer_bema import SWAWindow
from tests.algorithms.runs import TRAINABLE, FollowTrajectory, TrajectoryModel, follow, make_trainer


def shifted(trajectory, interval):
    """The averager samples at steps 1, 1 + interval, ..., ours at the intervals' ends: the weights come later here."""
    later = [max(step - interval + 1, 0) for step in range(61)]
    return {name: values[later] for name, values in trajectory.items()}


@pytest.mark.parametrize('id', ['wa00', 'wa01', 'wa02', 'wa03'])
def test_trainer_reproduces_the_weight_averager(golden, id):
    """After each horizon the average is what the averager saves then, and stays so until the next one ends."""
    config, expected = golden('epfml').configs[id]['kwargs'], golden('epfml').of(id)
    interval, horizon = config['interval'], config['horizon']
    average = SWAWindow(f'{interval}ba', f'{horizon}ba')
    seen = follow(shifted(golden('trajectory').arrays, interval), average)
    saved = expected['saved_counts'].tolist()
    assert saved == list(range(horizon, 61, horizon))
    for row, step in enumerate(saved):
        for name in TRAINABLE:
            for later in (step, min(step + horizon - 1, 60)):
                np.testing.assert_allclose(seen[later][name], expected[f'saved/{name}'][row], atol=5e-6, rtol=0)


@pytest.mark.parametrize('id', ['wa00', 'wa01', 'wa02'])
def test_trainer_reproduces_longer_horizons(golden, id):
    """The averager's sweep: the mean of the last horizons that are over."""
    config, expected = golden('epfml').configs[id]['kwargs'], golden('epfml').of(id)
    interval, period = config['interval'], config['horizon']
    for row, horizon in enumerate(expected['sweep_at60/horizons'].tolist()):
        average = SWAWindow(f'{interval}ba', f'{horizon}ba', f'{period}ba')
        seen = follow(shifted(golden('trajectory').arrays, interval), average)
        for name in TRAINABLE:
            np.testing.assert_allclose(seen[60][name], expected[f'sweep_at60/{name}'][row], atol=5e-6, rtol=0)


def test_until_the_first_period_ends_it_is_the_running_mean(golden):
    trajectory = golden('trajectory').arrays
    seen = follow(trajectory, SWAWindow('2ba', '8ba', update_after='4ba'))
    for step, steps in ((6, [6]), (8, [6, 8]), (10, [6, 8, 10]), (12, [6, 8, 10, 12]), (18, [6, 8, 10, 12])):
        np.testing.assert_allclose(seen[step]['a'], trajectory['a'][steps].mean(axis=0), atol=1e-6)


def test_a_checkpoint_at_each_horizon_holds_its_mean(golden, tmp_path):
    trajectory = golden('trajectory').arrays
    model = TrajectoryModel(trajectory)
    trainer = make_trainer(
        SWAWindow('2ba', '6ba'),
        model=model,
        max_duration='12ba',
        save_folder=str(tmp_path),
        save_interval='6ba',
    )
    trainer.state.optimizers = [FollowTrajectory(model, trajectory)]
    trainer.fit()
    trainer.close()
    for checkpoint, steps in (('ep0-ba6', [2, 4, 6]), ('ep0-ba12', [8, 10, 12])):
        saved = torch.load(tmp_path / f'{checkpoint}-rank0.pt', weights_only=False)['state']['model']
        np.testing.assert_allclose(saved['a'].numpy(), trajectory['a'][steps].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ('update_freq', 'horizon', 'period', 'updates', 'periods'),
    [
        ('5ba', '500ba', None, 100, 1),
        ('1ep', '6ep', '2ep', 2, 3),
        ('0.1dur', '0.3dur', None, 3, 1),
        ('1000tok', '4000tok', '1000tok', 1, 4),
    ],
)
def test_times_may_have_any_unit(update_freq, horizon, period, updates, periods):
    rule = SWAWindow(update_freq, horizon, period).average.rule
    assert (rule.updates, rule.periods) == (updates, periods)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: SWAWindow('5ba', '12ba'), "horizon='12ba' must be a multiple of update_freq='5ba'"),
        (lambda: SWAWindow('5ba', '20ba', '8ba'), "period='8ba' must be a multiple of update_freq='5ba'"),
        (lambda: SWAWindow('5ba', '20ba', '15ba'), "horizon='20ba' must be a multiple of period='15ba'"),
        (lambda: SWAWindow('5ba', '1ep'), "horizon='1ep' and update_freq='5ba' must count the same unit"),
        (lambda: SWAWindow('5ba', '0ba'), "horizon must be positive, but is '0ba'"),
        (lambda: SWAWindow('5ba', '2ba'), "horizon='2ba' must be a multiple of update_freq='5ba'"),
    ],
)
def test_bad_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize('update_freq', ['8tok', '0.04dur'])
def test_periods_of_less_than_a_step_are_refused(update_freq):
    """A step has 16 tokens, and the run twelve steps."""
    horizon = {'8tok': '64tok', '0.04dur': '0.2dur'}[update_freq]
    trainer = make_trainer(SWAWindow(update_freq, horizon), max_duration='12ba')
    with pytest.raises(ValueError, match='passes 2 times in a step, in which SWAWindow has one update'):
        trainer.fit()
    trainer.close()


def test_a_period_of_another_length_cannot_go_on(tmp_path):
    trainer = make_trainer(SWAWindow('2ba', '4ba'), max_duration='6ba', save_folder=str(tmp_path))
    trainer.fit()
    trainer.close()
    path = str(tmp_path / 'ep0-ba6-rank0.pt')
    for other in (SWAWindow('2ba', '6ba'), SWAWindow('1ba', '4ba'), SWAWindow('2ba', '4ba', '2ba')):
        with pytest.raises(ValueError, match=r'laid out for .*, and these settings need .*: go on with the settings'):
            make_trainer(other, load_path=path)
