# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""LAWA in a real Trainer: the authors' numbers, training on from the average, and snapshots on disk."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Event

from composer_bema import BEMA, EMA, LAWA
from tests.algorithms.runs import TRAINABLE, Record, follow, make_classifier, make_trainer, same, weights_of


@pytest.mark.parametrize('id', ['l00', 'l01', 'l02'])
def test_trainer_reproduces_the_authors_code(golden, id):
    config, expected = golden('lawa').configs[id], golden('lawa').of(id)
    lawa = LAWA(f'{config["every"]}ba', config['last'])
    seen = follow(golden('trajectory').arrays, lawa)
    steps = expected['steps'].tolist()
    assert steps[0] == config['every'] * config['last'] and steps[-1] == 60
    for row, step in enumerate(steps):
        for name in TRAINABLE:
            np.testing.assert_allclose(seen[step][name], expected[f'avg/{name}'][row], atol=5e-6, rtol=0)


def test_before_the_window_is_full_it_is_the_mean_of_what_there_is(golden):
    trajectory = golden('trajectory').arrays
    seen = follow(trajectory, LAWA('10ba', 4, update_after='5ba'))
    for step, steps in ((15, [15]), (25, [15, 25]), (35, [15, 25, 35])):
        np.testing.assert_allclose(seen[step]['a'], trajectory['a'][steps].mean(axis=0), atol=1e-6)


def moments(state):
    return {n: entry['exp_avg'].clone() for n, entry in state.optimizers[0].state_dict()['state'].items()}


def test_training_goes_on_from_the_average():
    """Which is put in after each update, and nothing else is: the optimizer keeps its moments."""
    led_to, put_in, kept = {}, {}, {}

    class Watched(LAWA):
        def _follow_update(self, state):
            step = state.timestamp.batch.value
            led_to[step], before = weights_of(state.model), moments(state)
            super()._follow_update(state)
            put_in[step], kept[step] = weights_of(state.model), (before, moments(state))

    lawa = Watched('3ba', 2, replace_training_weights=True)
    starts = Record(lambda state: weights_of(state.model), Event.BATCH_START)
    trainer = make_trainer(lawa, max_duration='10ba', callbacks=[starts])
    trainer.fit()
    trainer.close()
    assert list(put_in) == [3, 6, 9]
    previous = led_to[3]
    for step in put_in:
        for n, weights in put_in[step].items():
            if n == 'module.1.num_batches_tracked' or n.endswith('module.0.weight'):
                assert torch.equal(weights, led_to[step][n])
            else:
                torch.testing.assert_close(weights, (led_to[step][n] + previous[n]) / 2, rtol=0, atol=1e-6)
        # What led to the mean is in the next window, and not the mean.
        previous = led_to[step]
        assert same(starts.seen[step], put_in[step])
        before, after = kept[step]
        assert before and all(torch.equal(before[n], after[n]) for n in before)
    assert not same(led_to[6], put_in[6])


def test_averages_before_it_see_what_led_to_the_mean_and_those_after_it_the_mean():
    before, after = EMA(smoothing=0.0, update_freq='4ba', eval_labels=[]), BEMA('4ba', eval_labels=[], ema_power=0)
    lawa = LAWA('2ba', 2, replace_training_weights=True, eval_labels=[])
    trainer = make_trainer(before, lawa, after, max_duration='4ba')
    trainer.fit()
    trainer.close()
    buffers = after.average.state_dict()['buffers']['ema']
    mean, led_to = lawa.average.average(), before.average.average()
    assert all(torch.equal(buffers[n], mean[n]) for n in mean if mean[n].is_floating_point())
    assert not torch.equal(led_to['module.7.bias'], mean['module.7.bias'])


def test_an_update_that_is_skipped_replaces_nothing():
    class Poison(LAWA):
        def _update(self, state, logger):
            if state.timestamp.batch == 4:
                state.model.module[7].bias.data[1] = torch.inf
            super()._update(state, logger)

    lawa = Poison('2ba', 2, replace_training_weights=True, nonfinite='skip')
    trainer = make_trainer(lawa, max_duration='4ba')
    trainer.fit()
    trainer.close()
    assert lawa.average.num_skipped == 1
    assert trainer.state.model.module[7].bias[1] == torch.inf


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_snapshots_on_disk_are_those_in_memory_and_leave_no_file(tmp_path):
    """Every snapshot of a parameter is a mapped file that has no name any more."""

    def run(**kwargs):
        lawa = LAWA('2ba', 3, **kwargs)
        trainer = make_trainer(lawa, max_duration='9ba')
        trainer.fit()
        trainer.close()
        return lawa

    folder = tmp_path / 'snap' / 'shots'
    in_memory, on_disk = run(), run(snapshot_folder=str(folder))
    maps = Path('/proc/self/maps').read_text()
    parameters = [p for p in make_classifier().parameters() if p.requires_grad]
    assert maps.count(f'{folder}/snapshot-') >= 3 * len(parameters)
    assert all('(deleted)' in line for line in maps.splitlines() if str(folder) in line)
    assert not list(folder.iterdir())
    one, other = (lawa.average.state_dict()['buffers'] for lawa in (in_memory, on_disk))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name][n], other[name][n]) for name in one for n in one[name])
    # Nothing holds on to a file but the average.
    del one, other
    on_disk._forget_run()
    assert str(folder) not in Path('/proc/self/maps').read_text()


def test_a_folder_that_cannot_hold_them_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / 'file').write_text('')
    trainer = make_trainer(LAWA('2ba', 2, snapshot_folder=str(tmp_path / 'file')))
    with pytest.raises(FileExistsError, match='file'):
        trainer.fit()
    assert trainer.state.timestamp.batch == 0
    trainer.close()
    trainer = make_trainer(LAWA('2ba', 2, snapshot_folder=str(tmp_path / 'folder')))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.state.timestamp.batch == 0 and not list((tmp_path / 'folder').iterdir())
    trainer.fit()
    trainer.close()


def test_snapshots_are_kept_in_the_models_dtype_and_their_mean_in_fp32():
    from tests.algorithms.test_checkpointing import make_bf16_classifier

    lawa = LAWA('2ba', 2)
    trainer = make_trainer(lawa, model=make_bf16_classifier(), max_duration='4ba')
    trainer.fit()
    trainer.close()
    buffers = lawa.average.state_dict()['buffers']
    parameters = {n for n, p in make_bf16_classifier().named_parameters() if p.requires_grad}
    assert {t.dtype for n, t in buffers['snapshot_1'].items() if n in parameters} == {torch.bfloat16}
    assert {t.dtype for n, t in buffers['window'].items() if n in parameters} == {torch.float32}


def test_a_parameter_that_froze_is_averaged_on_and_may_thaw():
    lawa = LAWA('1ba', 2)
    trainer = make_trainer(lawa, max_duration='3ba')
    trainer.fit()
    weight = trainer.state.model.module[7].weight.requires_grad_(False)
    trainer.fit(duration='2ba')
    frozen = weight.detach().clone()
    torch.testing.assert_close(lawa.averaged_state_dict()['module.7.weight'], frozen, rtol=0, atol=0)
    weight.requires_grad_(True)
    trainer.fit(duration='1ba')
    trainer.close()
    torch.testing.assert_close(lawa.averaged_state_dict()['module.7.weight'], (frozen + weight.detach()) / 2)


def test_a_window_of_another_size_cannot_go_on(tmp_path):
    trainer = make_trainer(LAWA('2ba', 3), max_duration='6ba', save_folder=str(tmp_path))
    trainer.fit()
    trainer.close()
    path = str(tmp_path / 'ep0-ba6-rank0.pt')
    with pytest.raises(
        ValueError, match=r"laid out for \{'window': 3\}, and these settings need \{'window': 2\}: go on with"
    ):
        make_trainer(LAWA('2ba', 2), load_path=path)
    with pytest.warns(UserWarning, match=r"update_freq='3ba' \(saved: '2ba'\)"):
        make_trainer(LAWA('3ba', 3), load_path=path)


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: LAWA('1ba', 0), ValueError, 'window must be at least 1, but is 0'),
        (lambda: LAWA('1ba', '2ba'), TypeError, "window must be a whole number, but is '2ba'"),
        (lambda: LAWA(replace_training_weights='no'), TypeError, "must be True or False, but is 'no'"),
        (lambda: LAWA(snapshot_folder=5), TypeError, 'snapshot_folder must be None or the path of a folder, but is 5'),
        (
            lambda: LAWA(snapshot_folder=''),
            TypeError,
            "snapshot_folder must be None or the path of a folder, but is ''",
        ),
        (lambda: LAWA('0ba'), ValueError, 'update_freq must be positive'),
        (lambda: LAWA('1ba', update_interval='2ba'), ValueError, 'two names of one setting'),
    ],
)
def test_bad_settings_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_folder_in_the_home_of_the_user():
    assert LAWA(snapshot_folder='~/x').average.snapshot_folder == Path.home() / 'x'


def test_defaults():
    lawa = LAWA()
    assert (lawa.update_freq.to_timestring(), lawa.average.rule.size) == ('1000ba', 10)
    assert lawa.average.device == torch.device('cpu') and not lawa.replace_training_weights
    assert LAWA(update_interval='5ba').update_freq.to_timestring() == '5ba'
