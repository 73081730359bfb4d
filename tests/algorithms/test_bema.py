# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""BEMA and EMA in a real Trainer against the published implementations."""

import numpy as np
import pytest
import torch
from composer import Event
from composer.algorithms import EMA as ComposerEMA

from composer_bema import BEMA, EMA
from tests.algorithms.runs import TRAINABLE, Record, ReferenceModel, follow, follow_with_reference, make_trainer
from tests.conftest import load_golden

# TRL's rate may start above 1 there, which is no average.
BETA_ABOVE_1 = {'t13'}
TRL_IDS = [id for id in load_golden('trl').configs if id.startswith('t') and id not in BETA_ABOVE_1]


def meets_ours(id):
    """Composer updates at absolute multiples of its interval, ours at multiples counted from where it started."""
    golden = load_golden('composer_ema')
    interval = int((golden.configs[id]['kwargs']['update_interval'] or '1ba').removesuffix('ba'))
    return int(golden.of(id)['started']) % interval == 0


COMPOSER_IDS = [id for id in load_golden('composer_ema').configs if id.startswith('alg') and meets_ours(id)]


@pytest.mark.parametrize('id', TRL_IDS)
def test_trainer_reproduces_trl(golden, id):
    config, expected = golden('trl').configs[id]['kwargs'], golden('trl').of(id)
    settings = {name: config[name] for name in ('ema_power', 'bias_power', 'lag', 'multiplier', 'min_ema_multiplier')}
    bema = BEMA(f'{config["update_freq"]}ba', f'{config["update_after"]}ba', **settings)
    seen = follow(golden('trajectory').arrays, bema)
    updates = expected['updates'].tolist()
    assert bema.average.num_updates == len(updates) > 0
    assert min(seen) == updates[0]
    for row, step in enumerate(updates):
        for name in TRAINABLE:
            np.testing.assert_allclose(seen[step][name], expected[f'running/{name}'][row], atol=5e-6, rtol=0)


def test_a_reference_follows_as_trls_does(golden):
    config, expected = golden('trl').configs['ref00']['kwargs'], golden('trl').of('ref00')
    times = {n: f'{config[n]}ba' for n in ('update_freq', 'ref_model_update_freq', 'ref_model_update_after')}
    trajectory = golden('trajectory').arrays
    model = ReferenceModel(trajectory)
    steps = follow_with_reference(model, trajectory, max_duration='60ba', **times)
    # The first one in print, at step 3, writes the initial weights, since there is no average before step 4.
    first, *rest = expected['ref_updates'].tolist()
    assert first < 4 and steps == rest
    for row, update in enumerate(model.updates, start=1):
        for name in TRAINABLE:
            np.testing.assert_allclose(update[name], expected[f'ref/{name}'][row], rtol=0, atol=5e-6)


@pytest.mark.parametrize('id', COMPOSER_IDS)
def test_trainer_reproduces_composers_ema(golden, id):
    config, expected = golden('composer_ema').configs[id]['kwargs'], golden('composer_ema').of(id)
    start = int(expected['started'])
    interval = config['update_interval'] or '1ba'
    ema = EMA(config['half_life'], config['smoothing'], update_freq=interval, update_after=f'{start}ba')
    seen = follow(golden('trajectory').arrays, ema)
    updates = [step for step in expected['updates'].tolist() if step > start]
    assert ema.average.num_updates == len(updates) > 0
    for step in updates:
        row = expected['updates'].tolist().index(step)
        for name in TRAINABLE:
            np.testing.assert_allclose(seen[step][name], expected[f'avg/{name}'][row], atol=5e-6, rtol=0)


def test_composers_own_ema_on_the_same_training_run():
    """``EMA(half_life='10ba', update_after='1ba')`` is ``composer.algorithms.EMA(half_life='10ba')``."""

    def run(algorithm, average):
        record = Record(lambda state: average(), Event.BATCH_END)
        trainer = make_trainer(algorithm, callbacks=[record])
        trainer.fit()
        trainer.close()
        return record.seen

    ours, theirs = EMA('10ba', update_after='1ba'), ComposerEMA('10ba')
    our_steps = run(ours, lambda: {n: t.clone() for n, t in ours.average.average().items()})

    def their_average():
        model = theirs.ema_model
        tensors = {**model.named_parameters_dict, **model.named_buffers_dict}
        return {name: tensor.clone() for name, tensor in tensors.items() if tensor.is_floating_point()}

    their_steps = run(theirs, their_average)
    assert len(our_steps) == len(their_steps) == 24
    for step, expected in their_steps.items():
        for name, tensor in expected.items():
            torch.testing.assert_close(our_steps[step][name], tensor, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: BEMA('10ba', update_interval='10ba'), ValueError, 'update_freq and update_interval are two names'),
        (lambda: EMA(update_freq='10ba', update_interval='10ba'), ValueError, 'two names of one setting'),
        (lambda: BEMA(10), TypeError, 'update_freq must be a Composer time string'),
        (lambda: BEMA('10'), ValueError, "update_freq must be a Composer time string .* but is '10'"),
        (lambda: BEMA('0ba'), ValueError, 'update_freq must be positive'),
        (lambda: BEMA('1.5ba'), ValueError, 'update_freq must be'),
        (lambda: BEMA('10sec'), ValueError, 'wall-clock'),
        (lambda: BEMA(update_after='-1ba'), ValueError, 'update_after must be at least 0'),
        (lambda: BEMA(ema_power=-1), ValueError, 'ema_power must be at least 0'),
        (lambda: BEMA(lag='10'), TypeError, "lag must be a number, but is '10'"),
        (lambda: BEMA(update_freq='2dur'), ValueError, "update_freq must be at most '1dur'"),
        (lambda: BEMA(device='cpuu'), ValueError, "device must be .* but is 'cpuu'"),
        (lambda: BEMA(bias_power=float('nan')), ValueError, 'bias_power must be at least 0 and finite, but is nan'),
        (lambda: BEMA(min_ema_multiplier=2), ValueError, 'min_ema_multiplier must be between 0 and 1'),
        (lambda: EMA(half_life='10ba', smoothing=0.9), ValueError, 'give one of them'),
        (lambda: EMA(smoothing=1.0), ValueError, 'smoothing must be below 1'),
        (lambda: BEMA(half_life='0ba'), ValueError, 'half_life must be positive'),
        (lambda: BEMA(nonfinite='warn'), ValueError, 'nonfinite must be'),
        (lambda: BEMA(save_weights='ema'), ValueError, "save_weights must be 'average', 'training' or None"),
        (lambda: BEMA(eval_labels='bema'), TypeError, r"eval_labels must be a list .* \['bema'\]"),
    ],
)
def test_bad_settings_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_defaults():
    assert BEMA().update_freq.to_timestring() == '400ba'
    assert BEMA(half_life='1000ba').update_freq.to_timestring() == '1ba'
    assert EMA(smoothing=0.9).update_freq.to_timestring() == '1ba'
    assert BEMA(update_interval='10ba').update_freq.to_timestring() == '10ba'
    assert repr(BEMA('10ba', bias_power=None)).startswith("BEMA(update_freq='10ba', update_after='0ba', ema_power=0.5,")
