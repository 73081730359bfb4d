# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a checkpoint holds, and that a run resumed from it goes on as if it had never stopped."""

import logging

import numpy as np
import pytest
import torch
from composer import Callback, Event
from composer.algorithms import EMA as ComposerEMA
from composer.callbacks import CheckpointSaver, LRMonitor, SystemMetricsMonitor
from composer.models import ComposerClassifier
from composer.utils import create_interval_scheduler

from composer_bema import BEMA, EMA, LAWA
from composer_bema.algorithms import checkpointing
from composer_bema.algorithms.weight_averaging import averages_among
from composer_bema.formats.entries import unpack_entry
from tests.algorithms.family import FAMILY
from tests.algorithms.runs import Record, make_classifier, make_evaluator, make_trainer, same, weights_of


class InBfloat16(torch.nn.Module):
    """A classifier that computes in bf16."""

    def __init__(self):
        super().__init__()
        self.layers = make_classifier(torch.bfloat16).module

    def forward(self, inputs):
        return self.layers(inputs.bfloat16()).float()


def make_bf16_classifier():
    return ComposerClassifier(InBfloat16(), num_classes=4)


def run(*algorithms, **kwargs):
    """Runs to the end and returns everything that a resumed run has to reproduce, with the loss curve by step."""
    losses = Record(lambda state: state.loss.item(), Event.BATCH_END)
    kwargs.setdefault('eval_dataloader', make_evaluator('eval'))
    trainer = make_trainer(*algorithms, callbacks=[losses, *kwargs.pop('callbacks', [])], **kwargs)
    trainer.fit()
    trainer.close()
    end = {
        'model': weights_of(trainer.state.model),
        'optimizer': trainer.state.optimizers[0].state_dict()['state'],
        'averages': [algorithm.saved_state() for algorithm in averages_among(algorithms)],
    }
    return end, losses.seen


def entry_of(path, name='BEMA'):
    """What a monolithic checkpoint holds of an average."""
    return unpack_entry(torch.load(path, weights_only=False)['state']['callbacks']['AveragingCheckpoint'][name])


def assert_equal(one, other, path=''):
    """Asserts that two nests of dicts, lists, tensors and numbers agree bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f'{path}/{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f'{path}/{index}')
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


@pytest.mark.parametrize('model', [make_classifier, make_bf16_classifier])
@pytest.mark.parametrize('name', FAMILY)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name, model):
    """Saved before the burn-in, at it, between updates, at an update, within and at the end of an epoch."""

    def settings():
        average = FAMILY[name](update_freq='4ba', update_after='7ba', eval_labels=['eval'], save_weights='average')
        other = BEMA if name == 'EMA' else EMA
        return [average, other(half_life='9ba', update_freq='1ep', eval_labels=[])]

    folder = str(tmp_path)
    whole, losses = run(*settings(), model=model(), save_folder=folder, save_interval='1ba', eval_interval='5ba')
    for checkpoint in ('ep0-ba5', 'ep0-ba7', 'ep0-ba9', 'ep0-ba11', 'ep0-ba12', 'ep1-ba15'):
        path = f'{folder}/{checkpoint}-rank0.pt'
        resumed, rest = run(*settings(), model=model(), load_path=path, eval_interval='5ba')
        assert_equal(resumed, whole, checkpoint)
        assert rest == {step: loss for step, loss in losses.items() if step in rest} and len(rest) < len(losses)


def test_a_run_that_is_resumed_without_its_state_differs(tmp_path):
    """The control of the test above: equality there is not for want of a difference."""
    whole, _ = run(BEMA('4ba', '7ba', save_weights='training'), save_folder=str(tmp_path), save_interval='11ba')
    with pytest.warns(UserWarning, match='BEMA starts anew from the weights of step 11'):
        path, ignored = str(tmp_path / 'ep0-ba11-rank0.pt'), ['state/callbacks/AveragingCheckpoint*']
        resumed, _ = run(BEMA('4ba', '7ba', save_weights='training'), load_path=path, load_ignore_keys=ignored)
    assert_equal(resumed['model'], whole['model'])
    assert resumed['averages'][0]['num_updates'] == whole['averages'][0]['num_updates'] - 1


@pytest.mark.parametrize(
    ('algorithms', 'kwargs'),
    [
        (lambda: [EMA('2ba', eval_labels=[])], {}),
        (lambda: [EMA('2ba')], {}),
        (lambda: [BEMA('4ba')], {'load_ignore_keys': ['state/callbacks/*']}),
    ],
)
def test_nobody_trains_on_from_an_average_unawares(tmp_path, algorithms, kwargs):
    saving = [BEMA('4ba', eval_labels=[], save_weights='average'), EMA('2ba', eval_labels=[])]
    run(*saving, save_folder=str(tmp_path), max_duration='8ba')
    with pytest.raises(ValueError, match='model in the checkpoint holds the BEMA weights, .* load_weights_only=True'):
        make_trainer(*algorithms(), load_path=str(tmp_path / 'ep0-ba8-rank0.pt'), **kwargs)


def test_a_save_interval_with_a_memory_is_asked_once(tmp_path):
    asked = []

    def every_fifth_question(state, event):
        asked.append(event)
        return len(asked) % 5 == 0

    bema = BEMA('2ba')
    run(bema, save_folder=str(tmp_path), save_interval=every_fifth_question, max_duration='12ba', eval_dataloader=None)
    assert len(asked) == 12 + 1
    assert sorted(path.name for path in tmp_path.glob('ep*')) == ['ep0-ba10-rank0.pt', 'ep0-ba5-rank0.pt']
    assert entry_of(tmp_path / 'ep0-ba5-rank0.pt')['model_holds'] == 'average'


def test_a_saver_that_decides_for_itself_finds_the_average():
    """A subclass of CheckpointSaver with a condition of its own, and a saver added to a trainer that stands already."""

    class SaveBest(CheckpointSaver):
        def batch_checkpoint(self, state, logger):
            found.append(weights_of(state.model))

    class Late(Callback):
        def batch_checkpoint(self, state, logger):
            found.append(weights_of(state.model))

    found = []
    bema = BEMA('1ba')
    trainer = make_trainer(bema, max_duration='1ba', callbacks=[SaveBest(save_interval='100ba')])
    trainer.state.callbacks.append(Late())
    trainer.fit()
    averaged = bema.averaged_state_dict()
    assert len(found) == 2 and all(same(weights, {n: averaged[n] for n in weights}) for weights in found)
    trainer.close()


def test_a_checkpoint_holds_the_average_and_the_training_weights(tmp_path, make_average):
    averaging = make_average(update_freq='4ba')
    name, rule = type(averaging).__name__, averaging.average.rule
    training = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    average = Record(
        lambda state: averaging.averaged_state_dict() if averaging.average.num_updates else None, Event.BATCH_END
    )
    run(averaging, save_folder=str(tmp_path), save_interval='6ba', callbacks=[training, average], max_duration='12ba')
    state = torch.load(tmp_path / 'ep0-ba6-rank0.pt', weights_only=False)['state']
    assert dict(state['algorithms'])[name]['model_holds'] == 'average'
    entry = entry_of(tmp_path / 'ep0-ba6-rank0.pt', name)
    assert entry['model_holds'] == 'average'
    assert_equal(dict(state['model']), average.seen[6])
    assert same(entry['training_weights'], {n: training.seen[6][n] for n in entry['training_weights']})
    buffers = {*rule.buffers, *rule.statistics.buffers}
    assert entry['digests'].keys() == {*buffers, 'latest', 'training_weights'}
    if averaging.average.device is None:
        # What the model holds is not in the file a second time.
        for held, names in ((rule, 'module.7.bias'), (rule.statistics, 'module.1.running_mean')):
            others = [buffer for buffer in held.buffers if buffer != held.average]
            assert all(names in entry['buffers'][buffer] for buffer in others)
            assert names not in entry['buffers'].get(held.average, {})


def test_what_an_average_stores_needs_no_pickle(tmp_path):
    averages = BEMA('2ba', lag=np.int64(10), eval_labels=[], save_weights='average'), EMA('2ba', eval_labels=[])
    run(*averages, max_duration='4ba', save_folder=str(tmp_path))
    saved = torch.load(tmp_path / 'ep0-ba4-rank0.pt', weights_only=False)['state']
    entries = [saved['callbacks']['AveragingCheckpoint'], dict(saved['algorithms'])['BEMA']]
    torch.save(entries, tmp_path / 'entries.pt')
    assert_equal(torch.load(tmp_path / 'entries.pt', weights_only=True), entries)


class Saver(Callback):
    """Another saver of models: keeps what it finds in the model at the checkpoint events it listens to."""

    def __init__(self):
        self.found = {}

    def batch_checkpoint(self, state, logger):
        self.found[f'batch {state.timestamp.batch.value}'] = weights_of(state.model)

    def epoch_checkpoint(self, state, logger):
        self.found[f'epoch {state.timestamp.batch.value}'] = weights_of(state.model)


class IntervalSaver(Callback):
    """A saver in the manner of llm-foundry: one hook for all events, and an interval under `check_interval`."""

    def __init__(self):
        self.check_interval = create_interval_scheduler('6ba')
        self.last_checkpoint_batch = None
        self.found = {}

    def run_event(self, event, state, logger):
        if event == Event.BATCH_CHECKPOINT and self.check_interval(state, event):
            self.last_checkpoint_batch = state.timestamp.batch
            self.found[state.timestamp.batch.value] = weights_of(state.model)


@pytest.mark.parametrize('save_weights', ['average', 'training'])
def test_every_saver_finds_the_weights_that_were_asked_for(save_weights, make_average):
    averaging = make_average(update_freq='4ba', save_weights=save_weights)
    saver, interval_saver = Saver(), IntervalSaver()
    training = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    average = Record(
        lambda state: averaging.averaged_state_dict() if averaging.average.num_updates else None, Event.BATCH_END
    )
    run(averaging, callbacks=[saver, interval_saver, training, average])
    for key, found in {
        **saver.found,
        **{f'batch {step}': found for step, found in interval_saver.found.items()},
    }.items():
        step = int(key.split()[1])
        is_average = save_weights == 'average' and step >= 4
        assert same(found, {n: average.seen[step][n] for n in found} if is_average else training.seen[step]), key
    assert list(interval_saver.found) == [6, 12, 18, 24]


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_a_saver_that_fails_leaves_training_weights(tmp_path, error):
    class FullDisk(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch == 3:
                raise error('no space left')

    left = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    bema = BEMA('1ba')
    trainer = make_trainer(bema, callbacks=[left, FullDisk()])
    with pytest.raises(error, match='no space left'):
        trainer.fit()
    path = trainer.save_checkpoint(str(tmp_path / 'other.pt'), weights_only=True)
    assert same({n: torch.load(path, weights_only=False)['state']['model'][n] for n in left.seen[3]}, left.seen[3])
    trainer.fit()
    trainer.close()
    assert trainer.state.timestamp.batch == 24


def test_nothing_is_swapped_where_nobody_saves(tmp_path):
    """An exchange of all weights after every step would cost more than the updates."""
    bema = BEMA('2ba')
    swaps = []
    swap_in = bema._swap_in
    bema._swap_in = lambda state, purpose: (swaps.append(state.timestamp.batch.value), swap_in(state, purpose))
    callbacks = [LRMonitor(), SystemMetricsMonitor()]
    trainer = make_trainer(bema, save_folder=str(tmp_path), save_interval='10ba', callbacks=callbacks)
    trainer.fit()
    trainer.close()
    assert swaps == [10, 20, 24]


def test_updates_start_from_the_training_weights_after_a_save(tmp_path):
    """The epoch's last batch saves the average, and the update at the end of the epoch comes after it."""
    plain, saving = BEMA('1ep'), BEMA('1ep')
    run(plain, max_duration='3ep', eval_dataloader=None)
    run(saving, max_duration='3ep', eval_dataloader=None, save_folder=str(tmp_path), save_interval='12ba')
    assert (tmp_path / 'ep1-ba24-rank0.pt').exists()
    assert_equal(saving.state_dict(), plain.state_dict())


def test_iteration_checkpoints_hold_the_average(tmp_path):
    bema = BEMA('5ba')
    averages = Record(lambda state: bema.averaged_state_dict() if bema.average.num_updates else None, Event.EPOCH_END)
    left = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    right = Record(lambda state: weights_of(state.model), Event.EPOCH_START)
    trainer = make_trainer(bema, save_folder=str(tmp_path), save_interval='1iter', callbacks=[averages, left, right])
    trainer.state._iteration_length = '1ep'
    trainer.fit()
    trainer.close()
    saved = torch.load(tmp_path / 'ep1-ba12-rank0.pt', weights_only=False)['state']['model']
    assert_equal(dict(saved), averages.seen[12])
    assert same(left.seen[12], right.seen[12])


def test_without_its_state_a_checkpoint_of_the_average_cannot_be_resumed(tmp_path):
    for save_weights in ('average', 'training'):
        bema = BEMA('4ba', state_in_checkpoint=False, save_weights=save_weights)
        run(bema, save_folder=str(tmp_path / save_weights), max_duration='6ba')
    entries = {}
    for save_weights in ('average', 'training'):
        path = tmp_path / save_weights / 'ep0-ba6-rank0.pt'
        entries[save_weights] = torch.load(path, weights_only=False)['state']['callbacks']['AveragingCheckpoint']
    assert entries == {'average': {'model_holds': 'BEMA'}, 'training': {'model_holds': 'training'}}
    with pytest.raises(ValueError, match='model in the checkpoint holds the BEMA weights, .* load_weights_only=True'):
        make_trainer(BEMA('4ba'), load_path=str(tmp_path / 'average' / 'ep0-ba6-rank0.pt'))
    trainer = make_trainer(BEMA('4ba'), load_path=str(tmp_path / 'training' / 'ep0-ba6-rank0.pt'))
    with pytest.warns(UserWarning, match='starts anew from the weights of step 6'):
        trainer.fit()
    trainer.close()


def test_new_settings_win_over_the_saved_ones(tmp_path):
    run(BEMA('4ba'), save_folder=str(tmp_path), max_duration='8ba')
    path = str(tmp_path / 'ep0-ba8-rank0.pt')
    bema = BEMA('8sp', bias_power=0.1)
    with pytest.warns(UserWarning, match=r"update_freq='8sp' \(saved: '4ba'\), bias_power=0.1 \(saved: 0.2\)"):
        trainer = make_trainer(bema, load_path=path)
    kept = {n: t.clone() for n, t in bema.average.average().items()}
    saved = torch.load(path, weights_only=False)['state']['model']
    assert all(torch.equal(kept[n], saved[n]) for n in kept)
    trainer.fit()
    trainer.close()
    assert bema.average.num_updates == 2 + 16
    with pytest.warns(UserWarning, match=r"update_after='20ba' \(saved: '0ba'\); averaging has begun, .* no effect"):
        make_trainer(BEMA('4ba', '20ba'), load_path=path)
    with pytest.raises(ValueError, match="no buffer 'theta_0', which these settings need"):
        run(BEMA('4ba', bias_power=None), save_folder=str(tmp_path / 'ema'), max_duration='8ba')
        make_trainer(BEMA('4ba'), load_path=str(tmp_path / 'ema' / 'ep0-ba8-rank0.pt'))


def test_a_checkpoint_without_averaging_state_starts_anew(tmp_path):
    run(save_folder=str(tmp_path), max_duration='6ba')
    bema = BEMA('4ba')
    trainer = make_trainer(bema, load_path=str(tmp_path / 'ep0-ba6-rank0.pt'))
    with pytest.warns(UserWarning, match='BEMA starts anew from the weights of step 6: no average'):
        trainer.fit()
    trainer.close()
    assert bema.average.num_updates == (24 - 6) // 4


def test_weights_alone_start_a_new_average_from_the_saved_one(tmp_path):
    bema = BEMA('4ba')
    run(bema, save_folder=str(tmp_path), max_duration='8ba')
    averaged = bema.averaged_state_dict()
    trainer = make_trainer(
        BEMA('4ba'),
        load_path=str(tmp_path / 'ep0-ba8-rank0.pt'),
        load_weights_only=True,
        load_strict_model_weights=True,
    )
    assert_equal(dict(trainer.state.model.state_dict()), averaged)
    trainer.fit()
    trainer.close()


def test_composers_ema_in_a_checkpoint_is_recognised(tmp_path):
    for folder, interval in (('active', '1ba'), ('inactive', '7ba')):
        run(ComposerEMA('4ba', update_interval=interval), save_folder=str(tmp_path / folder), max_duration='6ba')
    with pytest.raises(ValueError, match="'EMA' entry was written by Composer's own EMA, and its model then holds"):
        make_trainer(EMA('4ba'), load_path=str(tmp_path / 'active' / 'ep0-ba6-rank0.pt'))
    path = tmp_path / 'inactive' / 'ep0-ba6-rank0.pt'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['state']['algorithms'][0][1]['ema_weights_active'] = False
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="written by Composer's own EMA and is not loaded"):
        trainer = make_trainer(EMA('4ba'), load_path=str(path))
    with pytest.warns(UserWarning, match='EMA starts anew'):
        trainer.fit()
    trainer.close()


@pytest.mark.parametrize('average', [BEMA, LAWA])
def test_composers_ema_is_recognised_by_averages_of_other_names(tmp_path, average):
    """Composer shows them nothing of it, and training would go on from averaged weights."""
    run(ComposerEMA('4ba', update_interval='1ba'), save_folder=str(tmp_path), max_duration='6ba')
    path = str(tmp_path / 'ep0-ba6-rank0.pt')
    with pytest.raises(ValueError, match="ep0-ba6-rank0.pt' was written by Composer's own EMA"):
        make_trainer(average('4ba'), load_path=path)
    make_trainer(average('4ba'), load_path=path, load_weights_only=True).close()
    make_trainer(average('4ba'), load_path=path, load_ignore_keys=['state/timestamp']).close()


def test_what_is_resumed_without_an_average_need_not_be_readable_here(tmp_path, caplog, monkeypatch):
    """Composer unpickles whatever there is; an object store is not asked twice."""
    run(save_folder=str(tmp_path), max_duration='6ba')
    path = tmp_path / 'ep0-ba6-rank0.pt'
    make_trainer(BEMA('4ba'), load_path=str(path)).close()

    def refuse(path):
        raise ValueError('an unknown format')

    monkeypatch.setattr(checkpointing, 'open_checkpoint', refuse)
    with caplog.at_level(logging.INFO, 'composer_bema'):
        make_trainer(BEMA('4ba'), load_path=str(path)).close()
    assert 'is an average cannot be told: an unknown format' in caplog.text
    with pytest.warns(UserWarning, match="'s3://bucket/6.pt' has none of this run's averages"):
        checkpointing._check_that_composers_ema_is_not_resumed('s3://bucket/6.pt', 'a run')


def test_evaluating_a_loaded_checkpoint_sees_the_average(tmp_path, make_average):
    average = make_average(update_freq='4ba')
    run(average, save_folder=str(tmp_path), max_duration='8ba')
    training, averaged = weights_of(average._run.model), average.averaged_state_dict()
    seen = Record(lambda state: weights_of(state.model), Event.EVAL_BATCH_END)
    loaded = make_average(update_freq='4ba')
    trainer = make_trainer(loaded, load_path=str(tmp_path / 'ep0-ba8-rank0.pt'), callbacks=[seen])
    assert same(weights_of(trainer.state.model), training)
    trainer.eval(make_evaluator('eval'))
    assert same(seen.seen[8], {n: averaged[n] for n in seen.seen[8]})
    assert same(weights_of(trainer.state.model), training)
    trainer.close()


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    run(BEMA('4ba'), save_folder=str(tmp_path), max_duration='8ba')
    model = make_classifier()
    model.module[7] = torch.nn.Linear(16, 4, bias=False)
    with pytest.raises(ValueError, match=r"'module\.7\.bias' that the model lacks"):
        make_trainer(BEMA('4ba'), model=model, load_path=str(tmp_path / 'ep0-ba8-rank0.pt'))
