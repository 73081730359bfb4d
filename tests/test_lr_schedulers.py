# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Schedules give the published multipliers, in every unit and at every scale, alone and in real runs."""

import re
from functools import cache
from typing import Any, Optional, get_args

import pytest
import torch
from composer import Event, State, Time, Timestamp
from composer.devices import DeviceCPU
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from composer_bema import CosineAnnealingWithConstantTailScheduler, WarmupStableDecayScheduler
from composer_bema.averaging.decay_shapes import LearningRateDecay, decay_factor
from composer_bema.training.registry import build, find_builder
from tests.algorithms.runs import Record, make_trainer
from tests.conftest import load_golden

SHAPES = get_args(LearningRateDecay)
# The published names of the shapes.
PUBLISHED = {
    'linear': 'linear',
    'exp': 'exponential',
    'cosine': 'cosine',
    'miror_cosine': 'mirror-cosine',
    'square': 'square',
    'sqrt': '1-sqrt',
}
LR = 0.02  # of `make_trainer`

WSD = WarmupStableDecayScheduler
CosineTail = CosineAnnealingWithConstantTailScheduler


@cache
def empty_state(steps_in_epoch: Optional[int]) -> State:
    state = State(torch.nn.Linear(1, 1), rank_zero_seed=0, run_name='schedule', device=DeviceCPU())
    loader = [None] * steps_in_epoch if steps_in_epoch else iter([])
    state.set_dataloader(loader, 'train')
    return state


def factor(
    scheduler: ComposerScheduler,
    max_duration: str = '100ba',
    ssr: float = 1.0,
    steps_in_epoch: Optional[int] = 10,
    **counts: int,
) -> float:
    """The multiplier at a moment of a run, such as `batch=3`."""
    state = empty_state(steps_in_epoch)
    state.max_duration = max_duration
    state.timestamp = Timestamp(**counts)
    return scheduler(state, ssr)


def factors(scheduler: ComposerScheduler, *batches: int, **run: Any) -> list[float]:
    return [factor(scheduler, batch=batch, **run) for batch in batches]


# ------------------------------------------------------------------------------------------------------- golden numbers


def published(id: str) -> list[Any]:
    """The settings of every row of golden factors, with its number."""
    rows = load_golden('epfml').configs[id]['rows']
    return [pytest.param(row, settings, id=f'{id}{row}') for row, settings in enumerate(rows)]


def golden_factors(id: str, row: int) -> dict[int, float]:
    arrays = load_golden('epfml').of(id)
    return dict(zip(arrays['steps'].tolist(), arrays['factor'][row].tolist(), strict=True))


def test_all_golden_factors_are_used():
    for id, count in (('wsd', 48), ('cos_inf', 8)):
        assert len(published(id)) == len(load_golden('epfml').of(id)['factor']) == count


@pytest.mark.parametrize(('row', 'settings'), published('wsd'))
def test_warmup_stable_decay_gives_the_published_factors(row, settings):
    arguments = {
        't_warmup': f'{settings["n_warmup"]}ba',
        't_decay': f'{settings["fract_decay"]}dur',
        'alpha_i': 1 / settings['init_div_factor'],
        'alpha_f': settings['final_lr_factor'],
        'decay': PUBLISHED[settings['decay_type']],
    }
    run = {'max_duration': f'{settings["n_iterations"]}ba'}
    golden = golden_factors('wsd', row)
    if arguments['decay'] == 'exponential' and arguments['alpha_f'] == 0:
        # A decay that is over at once is refused, although its numbers are to be had.
        with pytest.raises(ValueError, match='alpha_f must be above 0'):
            WSD(**arguments)
        n, length = settings['n_iterations'], int(settings['fract_decay'] * settings['n_iterations'])
        parts = {step: (step - n + length) / length for step in golden}
        decay = {step: u for step, u in parts.items() if 0 <= u <= 1}
        assert [decay_factor('exponential', u) for u in decay.values()] == [golden[step] for step in decay]
        return
    assert factors(WSD(**arguments), *golden, **run) == pytest.approx(list(golden.values()), rel=0, abs=1e-12)


@pytest.mark.parametrize(('row', 'settings'), published('cos_inf'))
def test_the_cosine_with_a_tail_gives_the_published_factors(row, settings):
    golden = golden_factors('cos_inf', row)
    scheduler = CosineTail(
        t_warmup=f'{settings["n_warmup"]}ba',
        t_tail=f'{settings["n_inf"]}ba',
        alpha_i=1 / settings['div_factor'],
        alpha_f=1 / (settings['div_factor'] * settings['final_div_factor']),
    )
    found = factors(scheduler, *golden, max_duration=f'{settings["n_iterations"]}ba')
    assert found == pytest.approx(list(golden.values()), rel=0, abs=1e-12)


def test_a_fraction_of_the_run_is_rounded_down():
    """0.29 of 100 is 28.999... in floating point: the published code, too, is at 1 until step 72, not 71."""
    assert factors(WSD(t_decay='0.29dur'), 72, 73) == [1, pytest.approx(1 - 1 / 28)]


# -------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ('decay', 'quarter', 'half'),
    [
        ('linear', 0.85, 0.7),
        ('1-sqrt', 0.7, 0.4 + 0.6 * (1 - 0.5**0.5)),
        ('cosine', 0.4 + 0.15 * (2 + 2**0.5), 0.7),
        ('exponential', 0.4**0.25, 0.4**0.5),
        ('square', 0.9625, 0.85),
        ('mirror-cosine', 1.3 - 0.15 * (2 + 2**0.5), 0.7),
    ],
)
def test_every_decay_by_hand(decay, quarter, half):
    """Steps 80 to 100, from 1 to 0.4: 0.4 + 0.6 w(u)."""
    scheduler = WSD(t_warmup='10ba', t_decay='20ba', alpha_i=0.2, alpha_f=0.4, decay=decay)
    expected = [0.2, 0.6, 0.92, 1, 1, 1, quarter, half, 0.4, 0.4, 0.4]
    found = factors(scheduler, 0, 5, 9, 10, 50, 80, 85, 90, 100, 101, 500)
    assert found == pytest.approx(expected, rel=0, abs=1e-15)


def test_the_cosine_with_a_tail_by_hand():
    """A cosine from 1 to 0.4 over the steps 10 to 90."""
    scheduler = CosineTail(t_warmup='10ba', t_tail='10ba', alpha_i=0.2, alpha_f=0.4)
    expected = [0.2, 0.6, 0.92, 1, 0.4 + 0.15 * (2 + 2**0.5), 0.7, 0.4, 0.4, 0.4, 0.4]
    found = factors(scheduler, 0, 5, 9, 10, 30, 50, 90, 99, 100, 500)
    assert found == pytest.approx(expected, rel=0, abs=1e-15)


def test_defaults():
    assert factors(WSD(), 0, 90, 95, 100) == pytest.approx([1, 1, 0.5, 0])
    assert factors(CosineTail(), 0, 40, 80, 100) == pytest.approx([1, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ('ours', 'composers'),
    [
        (WSD('7ba', '93ba'), LinearWithWarmupScheduler('7ba')),
        (WSD('7ba', '1ba', alpha_f=1), ConstantWithWarmupScheduler('7ba')),
        (CosineTail('7ba', '0ba', alpha_f=0.3), CosineAnnealingWithWarmupScheduler('7ba', alpha_f=0.3)),
    ],
)
def test_the_limits_are_composers_own_schedules(ours, composers):
    steps = range(101)
    assert factors(ours, *steps) == pytest.approx(factors(composers, *steps), rel=0, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(
    ('unit', 'count', 'per_step'),
    [('ba', 'batch', 1), ('sp', 'sample', 8), ('tok', 'token', 16), ('iter', 'iteration', 1)],
)
def test_every_unit(monkeypatch, unit, count, per_step):
    monkeypatch.setattr(empty_state(10), '_iteration_length', Time(1, 'ep'))
    times = [f'{steps * per_step}{unit}' for steps in (10, 20, 100)]
    for max_duration in ('100ba', times[-1]):
        for scheduler in (WSD(*times), WSD(*map(Time.from_timestring, times))):
            found = [
                factor(scheduler, max_duration, **{'batch': step, count: step * per_step})
                for step in (0, 5, 10, 80, 90, 100)
            ]
            assert found == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_epochs_are_counted_in_steps():
    """An epoch has ten: the learning rate changes within it."""
    for scheduler in (WSD('1ep', '2ep', '10ep'), WSD('10ba', '2ep', '10ep'), WSD('1ep', '0.2dur')):
        for max_duration in ('10ep', '100ba'):
            found = factors(scheduler, 0, 5, 10, 80, 85, 90, 100, max_duration=max_duration)
            assert found == pytest.approx([0, 0.5, 1, 1, 0.75, 0.5, 0])


@pytest.mark.parametrize(
    ('max_duration', 'count', 'per_step'),
    [('100ba', 'batch', 1), ('800sp', 'sample', 8), ('1600tok', 'token', 16), ('10ep', 'batch', 1)],
)
def test_fractions_of_the_run_are_counted_in_its_unit(max_duration, count, per_step):
    for scheduler, expected in (
        (WSD('0.1dur', '0.2dur', alpha_f=0.5), [0, 0.5, 1, 1, 0.75, 0.5]),
        (CosineTail('0.1dur', '0.1dur', alpha_f=0.5), [0, 0.5, 1, 0.75, 0.5, 0.5]),
    ):
        steps = (0, 5, 10, 50 if isinstance(scheduler, CosineTail) else 80, 90, 100)
        found = [factor(scheduler, max_duration, **{'batch': step, count: step * per_step}) for step in steps]
        assert found == pytest.approx(expected)


def test_no_warmup_goes_with_every_unit():
    """The default is no warmup in steps, and no tail may be said in any unit."""
    assert factor(WSD(t_decay='20tok'), '100tok', batch=9, token=90) == 0.5
    assert factor(WSD(t_decay='20ba'), steps_in_epoch=None, batch=90) == 0.5
    assert factor(CosineTail('0ep', '0tok'), '100sp', batch=5, sample=50, steps_in_epoch=None) == 0.55


# --------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize('ssr', [0.5, 2.0])
@pytest.mark.parametrize('times', [('10ba', '20ba', '100ba'), ('0.1dur', '0.2dur', '1dur'), ('10ba', '0.2dur', '1dur')])
@pytest.mark.parametrize('make', [WSD, CosineTail])
def test_a_scaled_schedule_keeps_its_shape(make, times, ssr):
    """Composer's contract: the multiplier at t times the ratio is the one that was at t."""
    scheduler = make(*times, scale_warmup=True)
    steps = (0, 4, 10, 12, 50, 80, 82, 90, 98, 100, 110)
    scaled = [int(step * ssr) for step in steps]
    found = factors(scheduler, *scaled, max_duration=f'{int(100 * ssr)}ba', ssr=ssr)
    assert found == pytest.approx(factors(scheduler, *steps))


def test_the_warmup_is_scaled_only_if_asked():
    """As with Composer's own schedulers, whose warmups of a fraction of the run follow its length."""
    run = {'max_duration': '200ba', 'ssr': 2.0}
    for warmup, scale_warmup, end in (('10ba', False, 10), ('10ba', True, 20), ('0.1dur', False, 20)):
        scheduler = WSD(warmup, '20ba', '100ba', scale_warmup=scale_warmup)
        assert factors(scheduler, end - 1, end, **run) == pytest.approx([1 - 1 / end, 1])
        assert factors(scheduler, 160, 180, 200, **run) == pytest.approx([1, 0.5, 0])


# --------------------------------------------------------------------------------------------------------------- joints


@st.composite
def schedules(draw: st.DrawFn, unit: str = 'ba', at_least: int = 1) -> tuple[ComposerScheduler, tuple[int, int, int]]:
    """A schedule, and where its warmup ends and its decay starts and ends."""
    lengths = st.integers(at_least, 50 * at_least)
    warmup, constant, decay = draw(st.just(0) | lengths), draw(st.just(0) | lengths), draw(lengths)
    alphas = {'alpha_i': draw(st.floats(0, 1)), 'alpha_f': draw(st.floats(1e-6, 1))}
    times = {'t_warmup': f'{warmup}{unit}', 't_max': f'{warmup + constant + decay}{unit}'}
    if draw(st.booleans()):
        shape = draw(st.sampled_from(SHAPES))
        scheduler = WSD(**times, t_decay=f'{decay}{unit}', **alphas, decay=shape)
        return scheduler, (warmup, warmup + constant, warmup + constant + decay)
    return CosineTail(**times, t_tail=f'{constant}{unit}', **alphas), (warmup, warmup, warmup + decay)


@given(schedules())
def test_factors_rise_to_1_and_fall_to_the_last_one(schedule):
    scheduler, (warmup, start, end) = schedule
    found = factors(scheduler, *range(end + 10))
    assert all(min(scheduler.alpha_i, scheduler.alpha_f) - 1e-15 <= factor <= 1 for factor in found)
    rising, falling = found[: warmup + 1], found[start:]
    assert all(one <= other + 1e-15 for one, other in zip(rising, rising[1:], strict=False))
    assert all(one >= other - 1e-15 for one, other in zip(falling, falling[1:], strict=False))
    assert set(found[warmup : start + 1]) == {1}
    assert set(found[end:]) == {scheduler.alpha_f}
    assert warmup == 0 or found[0] == scheduler.alpha_i


@given(schedules('tok', at_least=10**13))
def test_factors_do_not_jump_where_parts_meet(schedule):
    """One token from a joint the factor is that of the joint, to the slope of the steepest shape: sqrt(1 / 1e13)."""
    scheduler, joints = schedule
    for joint in joints:
        for neighbour in (joint - 1, joint + 1):
            if neighbour > 0:
                found, here = (factor(scheduler, token=token) for token in (neighbour, joint))
                assert found == pytest.approx(here, rel=0, abs=4e-7)


# ------------------------------------------------------------------------------------------------------------ real runs


def learning_rates(scheduler: ComposerScheduler, **kwargs: Any) -> dict[int, float]:
    """The learning rate of every step of a run of 24 steps, as multiples of the optimizer's own, from step 1."""
    record = Record(lambda state: state.optimizers[0].param_groups[0]['lr'] / LR, Event.BATCH_START)
    trainer = make_trainer(schedulers=scheduler, callbacks=[record], **kwargs)
    trainer.fit()
    trainer.close()
    return {batch + 1: lr for batch, lr in record.seen.items()}


def at_steps(expected: dict[int, float]) -> dict[int, float]:
    """The multipliers at t = 0, 1, ... as the learning rates of steps: the first two have that of t = 0."""
    return pytest.approx({1: expected[0], **{t + 2: expected[t] for t in range(len(expected) - 1)}}, rel=0, abs=1e-12)


def wsd_by_hand(steps: int, warmup: int, decay: int) -> dict[int, float]:
    """A linear warmup from 0.5 and a linear decay to 0.1."""
    ramp = {t: 0.5 + 0.5 * t / warmup for t in range(warmup)}
    fall = {steps - left: 0.1 + 0.9 * left / decay for left in range(decay, 0, -1)}
    return {**ramp, **dict.fromkeys(range(warmup, steps - decay), 1.0), **fall}


def test_a_run_has_the_learning_rates_of_warmup_stable_decay():
    lrs = learning_rates(WSD('4ba', '0.25dur', alpha_i=0.5, alpha_f=0.1))
    assert lrs == at_steps(wsd_by_hand(24, warmup=4, decay=6))


def test_a_run_has_the_learning_rates_of_the_cosine_with_a_tail():
    expected = {t: 0.25 * t for t in range(4)}
    expected |= {t: 0.2 + 0.8 * decay_factor('cosine', (t - 4) / 14) for t in range(4, 18)}
    expected |= dict.fromkeys(range(18, 24), 0.2)
    assert learning_rates(CosineTail('4ba', '6ba', alpha_f=0.2)) == at_steps(expected)


def test_a_run_in_tokens():
    """Eight samples of two tokens a step."""
    scheduler = WSD('64tok', '0.25dur', alpha_i=0.5, alpha_f=0.1)
    assert learning_rates(scheduler, max_duration='384tok') == at_steps(wsd_by_hand(24, warmup=4, decay=6))


@pytest.mark.parametrize('step', [15, 18, 21])
def test_a_run_resumed_in_the_decay_has_the_learning_rates_of_the_whole_run(tmp_path, step):
    scheduler = WSD('4ba', '10ba', alpha_f=0.1, decay='1-sqrt')
    whole = learning_rates(scheduler, save_folder=str(tmp_path), save_interval='3ba')
    path = tmp_path / f'ep1-ba{step}-rank0.pt'
    resumed = learning_rates(WSD('4ba', '10ba', alpha_f=0.1, decay='1-sqrt'), load_path=str(path))
    assert resumed == {later: lr for later, lr in whole.items() if later > step}


@pytest.mark.parametrize(
    ('scheduler', 'ratio', 'steps', 'warmup', 'decay'),
    [
        (WSD('2ba', '3ba', '12ba', alpha_i=0.5, alpha_f=0.1, scale_warmup=True), 2.0, 24, 4, 6),
        (WSD('2ba', '3ba', '12ba', alpha_i=0.5, alpha_f=0.1), 2.0, 24, 2, 6),
        (WSD('2ba', '0.25dur', alpha_i=0.5, alpha_f=0.1), 0.5, 6, 2, 1),
        (WSD('4ba', '4ba', '12ba', alpha_i=0.5, alpha_f=0.1, scale_warmup=True), 0.5, 6, 2, 2),
        # When the Trainer is built the decay is scaled to 16 steps and the run still has 12.
        (WSD('2ba', '8ba', alpha_i=0.5, alpha_f=0.1), 2.0, 24, 2, 16),
    ],
)
def test_a_run_with_a_scale_schedule_ratio(scheduler, ratio, steps, warmup, decay):
    lrs = learning_rates(scheduler, max_duration='12ba', scale_schedule_ratio=ratio)
    assert lrs == at_steps(wsd_by_hand(steps, warmup, decay))


def test_a_decay_of_the_whole_scaled_run_starts_at_1():
    lrs = learning_rates(WSD(t_decay='12ba', alpha_f=0.1), max_duration='12ba', scale_schedule_ratio=2.0)
    assert lrs == at_steps(wsd_by_hand(24, 0, 24))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('make', 'settings', 'message'),
    [
        (WSD, {'alpha_i': -0.1}, 'alpha_i must be between 0 and 1, but is -0.1.'),
        (WSD, {'alpha_f': float('nan')}, 'alpha_f must be between 0 and 1, but is nan.'),
        (CosineTail, {'alpha_f': float('inf')}, 'alpha_f must be between 0 and 1, but is inf.'),
        (CosineTail, {'alpha_i': 1.1}, 'alpha_i must be between 0 and 1, but is 1.1.'),
        (
            WSD,
            {'decay': 'exponential'},
            "alpha_f must be above 0 where decay='exponential', but is 0.0.",
        ),
        (
            WSD,
            {'decay': 'sqrt'},
            "decay must be one of linear, 1-sqrt, cosine, exponential, square, mirror-cosine, but is 'sqrt'.",
        ),
        (WSD, {'decay': None}, f'decay must be one of {", ".join(SHAPES)}, but is None.'),
        (WSD, {'t_decay': '0ba'}, "t_decay must be positive, but is '0ba'."),
        (WSD, {'t_max': '0dur'}, "t_max must be positive, but is '0dur'."),
        (WSD, {'t_warmup': '-1ba'}, "t_warmup must be at least 0, but is '-1ba'."),
        (WSD, {'t_decay': '1.5dur'}, "t_decay must be at most '1dur', the whole run, but is '1.5dur'."),
        (CosineTail, {'t_tail': '10s'}, "t_tail='10s' counts wall-clock time, which no two runs share; "),
        (
            WSD,
            {'t_warmup': '60ba', 't_decay': '50ba', 't_max': '100ba'},
            "t_warmup='60ba', t_decay='50ba', t_max='100ba': t_decay must be more than 0, and t_warmup and t_decay "
            'together at most t_max.',
        ),
        (
            WSD,
            {'t_warmup': '0.2dur', 't_decay': '0.9dur'},
            "t_warmup='0.2dur', t_decay='0.9dur', t_max='1.0dur': t_decay must be more than 0, ",
        ),
        (
            CosineTail,
            {'t_warmup': '1ep', 't_tail': '1ep', 't_max': '2ep'},
            "t_warmup='1ep', t_tail='1ep', t_max='2ep': t_warmup and t_tail together must be less than t_max.",
        ),
        (
            WSD,
            {'t_warmup': '1ep', 't_decay': '10tok'},
            "t_warmup='1ep' and t_decay='10tok' must be counted in one unit, but are counted in 'ba' and 'tok'.",
        ),
        (
            CosineTail,
            {'t_tail': '10sp', 't_max': '100tok'},
            "t_tail='10sp' and t_max='100tok' must be counted in one unit, but are counted in 'sp' and 'tok'.",
        ),
    ],
)
def test_what_can_be_told_without_a_run_is_told_at_once(make, settings, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
        make(**settings)


@pytest.mark.parametrize('make', [WSD, CosineTail])
@pytest.mark.parametrize('time', ['soon', '10', '1.5ba', 'infba', 'nantok'])
def test_a_time_that_does_not_parse_is_named(make, time):
    with pytest.raises(ValueError, match=f"^t_max must be a Composer time string .*, but is '{time}'\\.$"):
        make(t_max=time)


@pytest.mark.parametrize('setting', [{'t_warmup': 10}, {'t_max': None}, {'alpha_i': '0.1'}, {'alpha_f': None}])
def test_a_setting_of_another_type_is_named(setting):
    ((name, value),) = setting.items()
    with pytest.raises(TypeError, match=f'^{name} must be .*, but is {value!r}\\.$'):
        WSD(**setting)


def test_fractions_are_added_up_exactly():
    """In floating point 0.1 + 0.2 is more than 0.3."""
    assert factors(WSD('0.1dur', '0.2dur', '0.3dur'), 0, 10, 20, 30) == pytest.approx([0, 1, 0.5, 0])


@pytest.mark.parametrize(
    ('scheduler', 'run', 'message'),
    [
        (
            WSD('60ba', '0.5dur'),
            {},
            "t_warmup='60ba', t_decay='0.5dur' (50ba in this run), t_max='1.0dur' (100ba in this run): t_decay must be",
        ),
        (WSD(t_decay='0.001dur'), {}, "t_warmup='0ba', t_decay='0.001dur' (0ba in this run), "),
        (WSD('1ep', '2ep', '100ba'), {'steps_in_epoch': 40}, "t_warmup='1ep' (40ba in this run), t_decay='2ep' (80ba"),
        (
            CosineTail('50ba', '0.5dur'),
            {},
            "t_warmup='50ba', t_tail='0.5dur' (50ba in this run), t_max='1.0dur' (100ba in this run): t_warmup and",
        ),
        (
            WSD('10ba', '0.2dur'),
            {'max_duration': '100tok'},
            "t_warmup='10ba' and t_decay='0.2dur' must be counted in one unit, but are counted in 'ba' and 'tok'.",
        ),
        (
            CosineTail(t_tail='10tok'),
            {'max_duration': '2ep'},
            "t_tail='10tok' and t_max='1.0dur' must be counted in one unit, but are counted in 'tok' and 'ba'.",
        ),
        (
            WSD('1ep', '20ba'),
            {'steps_in_epoch': None},
            "t_warmup='1ep' has to be counted in steps, but how many steps the epochs of this run have is not known: ",
        ),
        (
            WSD(),
            {'steps_in_epoch': None, 'max_duration': '2ep'},
            "t_decay='0.1dur' has to be counted in steps, but how many steps the epochs of this run have is not known",
        ),
        (WSD('1iter', '1iter', '9iter'), {}, "t_warmup='1iter' counts iterations, but this run has none."),
        (WSD('1tok', '2tok', '9tok'), {'batch': 1}, "t_warmup='1tok' counts tokens, but the data of this run counts"),
        # The warmup is not scaled with the run.
        (WSD('60ba', '20ba', '100ba'), {'ssr': 0.5, 'batch': 1}, "t_warmup='60ba', t_decay='20ba' (10ba in this run)"),
    ],
)
def test_what_needs_the_numbers_of_a_run_is_told_at_the_first_call(scheduler, run, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
        factor(scheduler, **run)


def test_a_trainer_is_not_built_with_a_schedule_that_does_not_fit():
    with pytest.raises(ValueError, match=r"^t_warmup='20ba', t_decay='0\.5dur' \(12ba in this run\), t_max="):
        make_trainer(schedulers=WSD('20ba', '0.5dur'))


# ---------------------------------------------------------------------------------------------------------------- YAMLs


@pytest.mark.parametrize(
    ('name', 'arguments', 'expected'),
    [
        ('warmup_stable_decay', {}, WSD()),
        (
            'warmup_stable_decay',
            {'t_warmup': '10ba', 't_decay': '0.2dur', 'alpha_i': 0.01, 'decay': 'square'},
            WSD('10ba', '0.2dur', alpha_i=0.01, decay='square'),
        ),
        ('cosine_with_constant_tail', {'t_tail': '30ba', 'alpha_f': 0}, CosineTail(t_tail='30ba', alpha_f=0)),
    ],
)
def test_yamls_build_them_by_name(name, arguments, expected):
    scheduler = build(find_builder('scheduler', name, 'scheduler.name'), arguments, 'scheduler')
    assert type(scheduler) is type(expected)
    assert factors(scheduler, *range(101)) == factors(expected, *range(101))
