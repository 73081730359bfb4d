# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Events, times and evaluators: when an average is updated, who sees it, and that training never does."""

import copy

import numpy as np
import pytest
import torch
from composer import Callback, Event
from composer.algorithms import EMA as ComposerEMA
from composer.core import DataSpec
from torch.utils.data import DataLoader, TensorDataset

from composer_bema import BEMA, EMA
from composer_bema import functional as cf
from composer_bema.averaging import fold, offload
from tests.algorithms.family import FAMILY, FUNCTIONS, REPLACING
from tests.algorithms.runs import (
    TRAINABLE,
    FollowTrajectory,
    Record,
    TrajectoryModel,
    follow,
    make_classifier,
    make_evaluator,
    make_loader,
    make_trainer,
    same,
    weights_of,
)
from tests.averaging.offloading import Procrastinator, stand_in_for_gpu


class TrainingWeights(Callback):
    """Fails unless each step starts from the weights that the step before it left."""

    def __init__(self):
        self.left = None

    def batch_start(self, state, logger):
        assert self.left is None or same(self.left, weights_of(state.model))

    def batch_end(self, state, logger):
        self.left = weights_of(state.model)

    def fit_end(self, state, logger):
        assert same(self.left, weights_of(state.model))


class FailIn(Callback):
    """Raises the first time that the given event comes."""

    def __init__(self, event):
        self.event = event
        self.has_failed = False

    def run_event(self, event, state, logger):
        if event == self.event and not self.has_failed:
            self.has_failed = True
            raise OSError('the evaluation failed')


def update_steps(algorithm, **kwargs):
    """The steps at which a run updated its average."""
    steps = []
    update = algorithm._update

    def recorded(state, logger):
        steps.append(state.timestamp.batch.value)
        update(state, logger)

    algorithm._update = recorded
    iteration_length = kwargs.pop('iteration_length', None)
    trainer = make_trainer(algorithm, callbacks=[TrainingWeights()], **kwargs)
    trainer.state._iteration_length = iteration_length
    trainer.fit()
    trainer.close()
    return steps


@pytest.mark.parametrize(
    ('settings', 'run', 'expected'),
    [
        # 12 steps an epoch, 8 samples or 16 tokens a step.
        ({'update_freq': '10ba'}, {}, [10, 20]),
        ({'update_freq': '10ba', 'update_after': '3ba'}, {}, [13, 23]),
        ({'update_freq': '5ba', 'update_after': '5ba'}, {}, [10, 15, 20]),
        ({'update_freq': '1ep'}, {}, [12, 24]),
        ({'update_freq': '1ep', 'update_after': '5ba'}, {}, [12, 24]),
        ({'update_freq': '6ba', 'update_after': '1ep'}, {}, [18, 24]),
        # 20 samples are passed by steps 3, 5, 8, 10, ...: a modulo would miss all but each fifth.
        ({'update_freq': '20sp'}, {'max_duration': '10ba'}, [3, 5, 8, 10]),
        ({'update_freq': '50tok', 'update_after': '16tok'}, {'max_duration': '12ba'}, [5, 8, 11]),
        # Tenths of 20 steps, and of three epochs in epochs: none may be late for a rounding error.
        ({'update_freq': '0.1dur'}, {'max_duration': '20ba'}, list(range(2, 21, 2))),
        ({'update_freq': '0.3333dur', 'update_after': '0.25dur'}, {'max_duration': '12ba'}, [7, 11]),
        ({'update_freq': '0.25dur', 'update_after': '0.125dur'}, {'max_duration': '2ep'}, [9, 15, 21]),
        ({'update_freq': '1iter'}, {'iteration_length': '1ep'}, [12, 24]),
        ({'update_freq': '1ep', 'update_after': '5ba'}, {'max_duration': '1ep'}, [12]),
        ({'update_freq': '10ba', 'update_after': '30ba'}, {'max_duration': '3ep'}, []),
    ],
)
def test_updates_are_counted_from_the_burn_in(settings, run, expected):
    if not expected:
        with pytest.warns(UserWarning, match='BEMA will average nothing: its first update is due after 40 steps'):
            assert update_steps(BEMA(**settings), **run) == expected
    else:
        assert update_steps(BEMA(**settings), **run) == expected


@pytest.mark.parametrize('name', FUNCTIONS)
def test_the_algorithm_the_function_and_the_coefficients_agree(golden, name):
    """Over the same weights: kept in a run, kept in a loop by hand, and as a combination of the weights in float64."""
    trajectory = golden('trajectory').arrays
    algorithm = FAMILY[name](update_freq='4ba', update_after='3ba')
    seen = follow(trajectory, algorithm)
    model = TrajectoryModel(trajectory)
    state = FUNCTIONS[name](model, update_freq=4, update_after=3)
    optimizer = FollowTrajectory(model, trajectory)
    updates = []
    for step in range(1, 61):
        optimizer.step()
        if cf.compute_average(model, state):
            updates.append(step)
            average = state.average()
            assert all(np.array_equal(average[n].numpy(), seen[step][n]) for n in TRAINABLE)
    assert updates == list(range(7, 61, 4))
    rows = fold(state.rule, 3, updates)
    for n in TRAINABLE:
        combined = np.tensordot(rows, trajectory[n][[3, *updates]].astype(np.float64), 1)
        for step, expected in zip(updates, combined, strict=True):
            np.testing.assert_allclose(seen[step][n], expected, rtol=0, atol=5e-6)


def test_theta_0_is_taken_at_the_burn_in():
    record = Record(lambda state: weights_of(state.model), Event.FIT_START, Event.BATCH_END)
    for update_after, step in (('0ba', 0), ('1ba', 1), ('1ep', 12)):
        bema = BEMA('1ba', update_after)
        trainer = make_trainer(bema, callbacks=[record])
        trainer.fit()
        trainer.close()
        theta_0 = bema.average.state_dict()['buffers']['theta_0']
        assert theta_0.keys() < record.seen[step].keys()
        assert all(torch.equal(tensor.float(), record.seen[step][name]) for name, tensor in theta_0.items())


@pytest.mark.parametrize(
    ('half_life', 'update_freq', 'elapsed'),
    [('6ba', '3ba', 3 / 6), ('1ep', '3ba', 0.25), ('80sp', '5ba', 0.5), ('0.5dur', '6ba', 0.5), ('12ba', '1ep', 1.0)],
)
def test_a_half_life_may_have_another_unit(half_life, update_freq, elapsed):
    """After each update the EMA is (1 - beta) EMA + beta theta with beta = 1 - 2^-(elapsed / half_life)."""
    ema = EMA(half_life, update_freq=update_freq)
    average, theta = {}, {}

    def look(state):
        average[state.timestamp.batch.value] = ema.average.average()['module.7.bias'].clone()
        theta[state.timestamp.batch.value] = weights_of(state.model)['module.7.bias']

    trainer = make_trainer(ema, callbacks=[Record(look, Event.FIT_START, Event.BATCH_END, Event.EPOCH_END)])
    trainer.state.max_duration = '2ep'
    trainer.fit()
    trainer.close()
    first, second = {'3ba': (3, 6), '5ba': (5, 10), '6ba': (6, 12), '1ep': (12, 24)}[update_freq]
    beta = 1 - 0.5**elapsed
    expected = (1 - beta) * average[0] + beta * theta[first]
    torch.testing.assert_close(average[first], expected)
    torch.testing.assert_close(average[second], (1 - beta) * expected + beta * theta[second])


@pytest.mark.parametrize('name', [name for name in FAMILY if name != REPLACING])
def test_training_is_the_same_with_and_without_an_average(name):
    """Averaging, evaluating and saving leave the training weights bit for bit alone, everywhere in the loop."""

    def run(*algorithms, **kwargs):
        trainer = make_trainer(*algorithms, max_duration='30ba', **kwargs)
        trainer.fit()
        trainer.close()
        return weights_of(trainer.state.model)

    other = BEMA if name == 'EMA' else EMA
    averages = FAMILY[name](update_freq='3ba', eval_labels=['average']), other(update_freq='5ba', eval_labels=['other'])
    labels = ('training', 'other', 'average')
    evaluators = [make_evaluator(label) for label in labels]
    busy = {'eval_dataloader': evaluators, 'eval_interval': '1ba', 'callbacks': [TrainingWeights()]}
    plain = run(eval_dataloader=[make_evaluator(label) for label in labels], eval_interval='1ba')
    assert same(plain, run(*averages, **busy))


@pytest.mark.parametrize('name', ['BEMA', 'LAWA on disk', REPLACING])
def test_a_run_is_the_same_with_updates_off_its_thread(monkeypatch, name):
    """A worker that has not begun when somebody looks would show: evaluations, and LAWA's weights to train on from."""

    def run():
        algorithm = FAMILY[name](update_freq='3ba', device='cpu')
        record = Record(lambda state: weights_of(state.model), Event.EVAL_BEFORE_FORWARD, Event.BATCH_END)
        trainer = make_trainer(
            algorithm, callbacks=[record], eval_dataloader=make_evaluator('eval'), eval_interval='5ba'
        )
        trainer.fit()
        trainer.close()
        return record.seen, {n: tensor.clone() for n, tensor in algorithm.average.average().items()}

    seen, average = run()
    stand_in_for_gpu(monkeypatch)
    monkeypatch.setattr(offload, 'ThreadPoolExecutor', Procrastinator)
    seen_off_thread, average_off_thread = run()
    assert len(seen) == 24
    assert all(same(weights, seen_off_thread[step]) for step, weights in seen.items())
    assert same(average, average_off_thread)


@pytest.mark.parametrize('name', FAMILY)
def test_each_evaluator_sees_its_own_average(name):
    other = (BEMA if name == 'EMA' else EMA)(update_freq='4ba', eval_labels=['other'])
    average = FAMILY[name](update_freq='2ba', eval_labels=['average', 'predict'])
    seen = {}

    def look(state):
        if state.timestamp.batch == 7:
            seen[state.dataloader_label] = weights_of(state.model)

    labels = ['average', 'training', 'other']
    trainer = make_trainer(
        other,
        average,
        max_duration='7ba',
        eval_dataloader=[make_evaluator(label) for label in labels],
        eval_interval='3ba',
        callbacks=[Record(look, Event.EVAL_BATCH_END, Event.PREDICT_BATCH_END), TrainingWeights()],
    )
    trainer.fit()
    training = weights_of(trainer.state.model)
    trainer.predict(make_loader(16, shuffle=False))
    assert same(seen['training'], training)
    for label, seeing in (('other', other), ('average', average), ('predict', average)):
        expected = seeing.averaged_state_dict()
        assert not same(seen[label], training)
        assert all(torch.equal(seen[label][name], expected[name]) for name in seen[label])
    assert same(weights_of(trainer.state.model), training)
    trainer.close()


def test_nothing_is_swapped_before_the_first_update(make_average):
    seen = Record(lambda state: weights_of(state.model), Event.EVAL_BATCH_END)
    left = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    average = make_average(update_freq='4ba')
    trainer = make_trainer(
        average, max_duration='5ba', eval_dataloader=make_evaluator('eval'), eval_interval='1ba', callbacks=[seen, left]
    )
    with pytest.raises(ValueError, match=f'no {type(average).__name__} update yet'):
        average.get_averaged_model(trainer.state.model)
    trainer.fit()
    trainer.close()
    assert [step for step in range(1, 4) if same(seen.seen[step], left.seen[step])] == [1, 2, 3]
    assert not same(seen.seen[5], left.seen[5])


def test_logs_coefficients_and_distance():
    from composer.loggers import InMemoryLogger

    logger = InMemoryLogger()
    trainer = make_trainer(
        BEMA('2ba'), max_duration='4ba', loggers=[logger], eval_dataloader=make_evaluator('eval'), eval_interval='4ba'
    )
    trainer.fit()
    trainer.close()
    values = {name: [value for _, value in series] for name, series in logger.data.items()}
    assert values['bema/beta'] == pytest.approx([12**-0.5, 14**-0.5])
    assert values['bema/alpha'] == pytest.approx([12**-0.2, 14**-0.2])
    assert values['bema/num_updates'] == [1, 2]
    assert len(values['bema/distance']) == 1 and values['bema/distance'][0] > 0


@pytest.mark.parametrize('event', [Event.EVAL_START, Event.EVAL_BATCH_END, Event.EVAL_END])
def test_a_failed_evaluation_leaves_training_weights(tmp_path, event, make_average):
    """After an exception in an evaluation, fit goes on from the training weights and data, and saving saves those."""
    evaluator = {'eval_dataloader': make_evaluator('eval'), 'eval_interval': '2ba'}
    left = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    trainer = make_trainer(
        make_average(update_freq='2ba'), max_duration='6ba', callbacks=[left, FailIn(event)], **evaluator
    )
    with pytest.raises(OSError, match='evaluation failed'):
        trainer.fit()
    for weights_only in (True, False):
        path = trainer.save_checkpoint(str(tmp_path / f'{weights_only}.pt'), weights_only=weights_only)
        saved = torch.load(path, weights_only=False)['state']['model']
        assert same({name: saved[name] for name in left.seen[2]}, left.seen[2])
    trainer.fit()
    assert trainer.state.dataloader_label == 'train'
    assert trainer.state.dataloader is trainer.state.train_dataloader
    trainer.close()
    assert trainer.state.timestamp.batch == 6
    assert not same(weights_of(trainer.state.model), left.seen[2])


def test_a_failed_evaluation_outside_fit():
    bema = BEMA('1ba')
    trainer = make_trainer(bema, max_duration='2ba', callbacks=[FailIn(Event.EVAL_BATCH_END)])
    trainer.fit()
    training = weights_of(trainer.state.model)
    with pytest.raises(OSError):
        trainer.eval(make_evaluator('eval'))
    assert bema.average.swapped
    trainer.fit(duration='1ba')
    assert not bema.average.swapped
    assert trainer.state.dataloader_label == 'train'
    assert not same(training, weights_of(trainer.state.model))
    trainer.close()


def test_a_copy_of_a_model_has_no_tie_to_the_run(tmp_path):
    bema = BEMA('1ba')
    trainer = make_trainer(bema, max_duration='2ba')
    trainer.fit()
    model = trainer.state.model
    twin = copy.deepcopy(model.module)
    torch.save(twin, tmp_path / 'model.pt')
    assert same(weights_of(torch.load(tmp_path / 'model.pt', weights_only=False)), weights_of(model.module))
    trainer.close()


def test_averaged_and_training_model(make_average):
    average = make_average(update_freq='2ba')
    trainer = make_trainer(average, max_duration='7ba')
    trainer.fit()
    live, training, averaged = trainer.state.model, weights_of(trainer.state.model), average.averaged_state_dict()
    other = make_classifier()
    assert same(weights_of(average.get_averaged_model(other)), {n: averaged[n] for n in training})
    assert same(weights_of(live), training)
    with pytest.raises(ValueError, match='training weights are in the model'):
        average.get_training_model(live)
    assert average.get_averaged_model(live) is live
    assert same(weights_of(live), {n: averaged[n] for n in training})
    # What the user put there stays for whoever exports it.
    assert torch.equal(live.state_dict()['module.7.bias'], averaged['module.7.bias'])
    with pytest.raises(ValueError, match=f'{type(average).__name__} weights are in the model already'):
        average.get_averaged_model(live)
    assert same(weights_of(average.get_training_model(make_classifier())), training)
    assert same(weights_of(average.get_training_model(live)), training)
    assert same(weights_of(average.get_training_model(make_classifier())), training)
    # A part of the model is the model; one that merely shares a frozen tensor is not.
    assert average.get_averaged_model(live.module) is live.module
    assert same(weights_of(live), {n: averaged[n] for n in training})
    average.get_training_model(live)
    other = make_classifier()
    other.module[0].weight = live.module[0].weight
    assert same(weights_of(average.get_averaged_model(other)), {n: averaged[n] for n in training})
    assert same(weights_of(live), training)
    # The next step trains on the training weights, even if the average was left in.
    average.get_averaged_model(live)
    trainer.fit(duration='1ba')
    assert not average.average.swapped
    trainer.close()


def test_two_averages_know_of_each_other():
    bema, ema = BEMA('1ba', eval_labels=[]), EMA('1ba', eval_labels=[])
    trainer = make_trainer(bema, ema, max_duration='3ba')
    trainer.fit()
    live, training = trainer.state.model, weights_of(trainer.state.model)
    averaged = bema.averaged_state_dict()
    bema.get_bema_model(live)
    ema.get_ema_model(live)
    assert not bema.average.swapped and ema.average.swapped
    assert all(torch.equal(bema.averaged_state_dict()[n], averaged[n]) for n in averaged)
    assert same(weights_of(bema.get_training_model(live)), training)
    trainer.close()


def test_the_average_that_a_user_asked_for_outlives_the_trainer():
    bema = BEMA('1ba')
    trainer = make_trainer(bema, max_duration='3ba')
    trainer.fit()
    averaged = bema.averaged_state_dict()
    model = bema.get_bema_model(trainer.state.model)
    trainer.close()
    assert torch.equal(model.state_dict()['module.7.bias'], averaged['module.7.bias'])


def test_a_new_trainer_after_a_failed_evaluation_starts_from_training_weights():
    model = make_classifier()
    left = Record(lambda state: weights_of(state.model), Event.BATCH_END)
    bema = BEMA('1ba')
    evaluator = {'eval_dataloader': make_evaluator('eval'), 'eval_interval': '2ba'}
    trainer = make_trainer(bema, model=model, callbacks=[left, FailIn(Event.EVAL_BATCH_END)], **evaluator)
    with pytest.raises(OSError):
        trainer.fit()
    make_trainer(bema, model=model)
    assert same(weights_of(model), left.seen[2])


def test_an_average_asked_for_after_a_failed_evaluation_stays():
    bema = BEMA('1ba')
    trainer = make_trainer(bema, max_duration='2ba', callbacks=[FailIn(Event.EVAL_BATCH_END)])
    trainer.fit()
    averaged = bema.averaged_state_dict()
    with pytest.raises(OSError):
        trainer.eval(make_evaluator('eval'))
    exported = bema.get_bema_model(trainer.state.model).state_dict()
    assert torch.equal(exported['module.7.bias'], averaged['module.7.bias'])
    trainer.close()


def test_clocks_that_are_set_back_never_give_a_negative_rate():
    from composer.loggers import InMemoryLogger

    logger = InMemoryLogger()
    trainer = make_trainer(EMA('10ba', update_freq='5ba', update_after='2ba'), max_duration='14ba', loggers=[logger])
    trainer.fit()
    trainer.fit(duration='10ba', reset_time=True)
    trainer.close()
    series = [(timestamp.batch.value, value) for timestamp, value in logger.data['ema/beta']]
    assert series == [(step, pytest.approx(1 - 0.5**0.5)) for step in (7, 12, 5, 10)]


@pytest.mark.parametrize('half_life', ['0.5dur', '1ep'])
def test_a_run_that_grows_keeps_its_rates_positive(half_life):
    from composer.loggers import InMemoryLogger

    logger = InMemoryLogger()
    trainer = make_trainer(EMA(half_life, update_freq='4ba'), max_duration='8ba', loggers=[logger])
    trainer.fit()
    trainer.fit(train_dataloader=make_loader(192), duration='8ba')
    trainer.close()
    lengths = {'0.5dur': (4, 8), '1ep': (12, 24)}[half_life]
    expected = [1 - 0.5 ** (4 / length) for length in (lengths[0],) * 2 + (lengths[1],) * 2]
    assert [value for _, value in logger.data['ema/beta']] == pytest.approx(expected)


def test_averaging_beside_composers_other_algorithms():
    from composer.algorithms import GradientClipping, LabelSmoothing

    others = [GradientClipping('norm', 1.0), LabelSmoothing(0.1)]
    bema = BEMA('3ba')
    trainer = make_trainer(
        *others, bema, max_duration='9ba', callbacks=[TrainingWeights()], device_train_microbatch_size=2
    )
    trainer.fit(eval_dataloader=make_evaluator('eval'), eval_interval='2ba')
    trainer.close()
    assert bema.average.num_updates == 3


def test_an_algorithm_can_be_pickled(make_average):
    import pickle

    average = make_average(update_freq='3ba', save_weights='training')
    assert repr(pickle.loads(pickle.dumps(average))) == repr(average)


def test_averaged_state_dict_loads_into_a_fresh_model(make_average):
    average = make_average(update_freq='1ba')
    trainer = make_trainer(average, max_duration='3ba')
    trainer.fit()
    fresh = make_classifier()
    fresh.load_state_dict(average.averaged_state_dict(), strict=True)
    assert same(weights_of(fresh), weights_of(average.get_averaged_model(make_classifier())))
    trainer.close()


def test_nonfinite_weights(make_average):
    class Poison(Callback):
        def batch_end(self, state, logger):
            if state.timestamp.batch == 3:
                state.model.module[7].bias.data[1] = float('nan')

    average = make_average(update_freq='2ba')
    trainer = make_trainer(average, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"After step 4 'module\.\d+\.bias' holds a NaN"):
        trainer.fit()
    trainer.close()
    assert all(torch.isfinite(tensor.float()).all() for tensor in average.averaged_state_dict().values())

    average = make_average(update_freq='2ba', nonfinite='skip')
    record = Record(
        lambda state: average.averaged_state_dict() if average.average.num_updates else None, Event.BATCH_END
    )
    trainer = make_trainer(average, max_duration='6ba', callbacks=[Poison(), record])
    trainer.fit()
    trainer.close()
    assert (average.average.num_updates, average.average.num_skipped) == (1, 2)
    assert all(torch.equal(record.seen[2][name], average.averaged_state_dict()[name]) for name in ('module.7.bias',))


@pytest.mark.parametrize(
    ('algorithms', 'message'),
    [
        (lambda: [BEMA(), BEMA()], 'A run can have one BEMA only'),
        (lambda: [BEMA(), ComposerEMA()], "Composer's own EMA and BEMA cannot share a run"),
        (lambda: [EMA(), ComposerEMA()], "Composer's own EMA and EMA cannot share a run"),
        (lambda: [BEMA(), EMA()], 'give each of them eval_labels of its own'),
        (lambda: [BEMA(eval_labels=['a', 'b']), EMA(eval_labels=['b'])], "share the eval label 'b'"),
        (
            lambda: [
                BEMA(eval_labels=['a'], save_weights='average'),
                EMA(eval_labels=['b'], save_weights='average'),
            ],
            "both have save_weights='average'",
        ),
    ],
)
def test_algorithms_that_cannot_share_a_run(algorithms, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(*algorithms())


@pytest.mark.parametrize(
    ('algorithm', 'kwargs', 'message'),
    [
        (lambda: BEMA('1iter'), {}, "update_freq='1iter' counts iterations, but this run has none"),
        (lambda: BEMA(eval_labels=['bema']), {'eval_dataloader': True}, r"'bema', but the evaluators .* \['eval'\]"),
        (lambda: BEMA('10tok'), {'train_dataloader': True}, 'counts tokens, but the data of this run counts none'),
        (lambda: BEMA('1ba', update_after='10tok'), {'train_dataloader': True}, "update_after='10tok' counts tokens"),
    ],
)
def test_settings_that_do_not_fit_the_run(algorithm, kwargs, message):
    if 'eval_dataloader' in kwargs:
        kwargs = {'eval_dataloader': make_evaluator('eval')}
    if 'train_dataloader' in kwargs:
        data = TensorDataset(torch.randn(64, 8), torch.zeros(64, dtype=torch.long))
        kwargs = {'train_dataloader': DataSpec(DataLoader(data, batch_size=8), get_num_tokens_in_batch=lambda _: 0)}
    trainer = make_trainer(algorithm(), max_duration='1000ba', **kwargs)
    with pytest.raises(ValueError, match=message):
        trainer.fit()
    trainer.close()


def test_a_parameter_may_freeze_but_not_thaw():
    bema = BEMA('1ba')
    trainer = make_trainer(bema, max_duration='2ba')
    trainer.fit()
    model = trainer.state.model
    model.module[7].weight.requires_grad_(False)
    kept = bema.averaged_state_dict()['module.7.weight']
    trainer.fit(duration='2ba')
    assert torch.equal(bema.averaged_state_dict()['module.7.weight'], kept)
    model.module[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'module\.0\.weight' is trainable but has no average"):
        trainer.fit(duration='2ba')
    trainer.close()


def test_one_object_in_one_trainer_after_another(make_average):
    average = make_average(update_freq='2ba')
    averages = []
    for _ in range(2):
        trainer = make_trainer(average, max_duration='6ba')
        trainer.fit()
        averages.append(average.averaged_state_dict())
        trainer.close()
    assert same(*averages)


def test_a_swap_that_fails_leaves_no_purpose_behind(monkeypatch):
    """A checkpoint would say that its model holds the average, and hold the training weights."""
    ema = EMA(half_life='4ba')
    trainer = make_trainer(ema, max_duration='4ba')
    trainer.fit()

    def fail(model):
        raise MemoryError

    monkeypatch.setattr(ema.average, 'swap_in', fail)
    with pytest.raises(MemoryError):
        ema.get_averaged_model(trainer.state.model)
    assert ema.swapped_for is None
    monkeypatch.undo()
    ema.get_averaged_model(trainer.state.model)
    assert ema.swapped_for == 'user'
    trainer.close()
