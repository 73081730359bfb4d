# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages as they are named: the settings of every rule, what is refused, and the reference's schedules by hand."""

import numpy as np
import pytest

from composer_bema.averaging.decay import ConstantDecay, HalfLifeDecay, PowerDecay
from composer_bema.averaging.rules import BEMA, DEMA, EMA, OUEMA
from composer_bema.averaging.windows import SWAWindow, Window
from composer_bema.offline.settings import RULES, Setting, settings_of

POWERS = ('ema_power', 'lag', 'multiplier', 'min_ema_multiplier', 'half_life', 'schedule', 'ema_update_after')
POWERS_OF_BETA = ('ema_power', 'min_ema_multiplier')
SETTINGS = {
    'training': set(),
    'bema': {*POWERS, 'bias_power'},
    'ema': {*POWERS, 'smoothing'},
    'ouema': {*POWERS, 'bias_power'},
    'dema': {*POWERS, 'smoothing'},
    'lawa': {'window'},
    'swa_window': {'horizon', 'period'},
    'decay_merge': {'window', 'decay'},
}


# What there is


@pytest.mark.parametrize('rule', RULES)
def test_the_settings_of_every_rule(rule):
    """The steps are no settings of a rule's own, but of every `Setting`."""
    assert set(settings_of(rule)) == SETTINGS[rule]


@pytest.mark.parametrize(
    ('setting', 'title', 'name'),
    [
        (Setting('bema', {'bias_power': 0.2}, update_freq=400), 'BEMA', 'bema bias_power=0.2 update_freq=400'),
        (Setting('ema', update_after=5), 'EMA', 'ema update_after=5'),
        (Setting('ouema'), 'OUEMA', 'ouema'),
        (Setting('dema', {'half_life': 3.5}), 'DEMA', 'dema half_life=3.5'),
        (Setting('training', update_freq=2), 'training', 'training update_freq=2'),
        (Setting('lawa', {'window': 4}), 'LAWA', 'lawa window=4'),
        (Setting('swa_window', {'horizon': 8, 'period': 4}), 'SWAWindow', 'swa_window horizon=8 period=4'),
        (
            Setting('decay_merge', {'window': 4, 'decay': '1-sqrt'}, 2, 6),
            'DecayMerge',
            'decay_merge window=4 decay=1-sqrt update_freq=2 update_after=6',
        ),
    ],
)
def test_titles_and_names(setting, title, name):
    """The title is what a class would be called; the name has what was given, and no defaults."""
    assert (setting.title, str(setting)) == (title, name)


@pytest.mark.parametrize(
    ('rule', 'options', 'expected'),
    [
        ('bema', {}, BEMA(PowerDecay(0.2, 10.0), PowerDecay(0.5, 10.0))),
        ('bema', {'bias_power': None}, EMA(PowerDecay(0.5, 10.0))),
        ('bema', {'ema_power': None, 'lag': 1}, BEMA(PowerDecay(0.2, 1), ConstantDecay(1.0))),
        ('bema', {'half_life': 5}, BEMA(PowerDecay(0.2, 10.0), HalfLifeDecay(5))),
        ('ema', {'smoothing': 0.75}, EMA(ConstantDecay(0.25))),
        ('ema', {'ema_power': 1, 'multiplier': 2, 'min_ema_multiplier': 0.1}, EMA(PowerDecay(1, 10.0, 2, floor=0.1))),
        ('dema', {'half_life': 5}, DEMA(HalfLifeDecay(5))),
        # Its alpha counts from the burn-in, at step 3.
        ('ouema', {}, OUEMA(PowerDecay(0.2, 1.0, origin=3 - 10.0, min_age=1), PowerDecay(0.5, 10.0))),
        ('lawa', {'window': 4}, Window(4)),
        ('decay_merge', {'window': 4}, Window(4, 'linear')),
        ('decay_merge', {'window': 4, 'decay': 'cosine'}, Window(4, 'cosine')),
        # 5 steps from one update to the next.
        ('swa_window', {'horizon': 20}, SWAWindow(4, 1)),
        ('swa_window', {'horizon': 20, 'period': 10}, SWAWindow(2, 2)),
    ],
)
def test_rules_by_their_settings(rule, options, expected):
    assert Setting(rule, options, update_after=3).build(5) == expected


# What is refused


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            {'rule': 'swa'},
            "There is no rule 'swa', but bema, ema, ouema, dema, lawa, swa_window, decay_merge",
        ),
        ({'rule': 'BEMA'}, "There is no rule 'BEMA'"),
        ({'rule': {'a': 1}}, r"There is no rule \{'a': 1\}, but bema"),
        ({'rule': 'ema', 'options': {'bias_power': 1}}, "The rule 'ema' has no setting 'bias_power', but ema_power"),
        ({'rule': 'bema', 'options': {'update_freq': 2}}, "The rule 'bema' has no setting 'update_freq'"),
        ({'rule': 'ouema', 'options': {'update_after': 2}}, "The rule 'ouema' has no setting 'update_after'"),
        ({'rule': 'lawa', 'options': {'schedule': 'paper'}}, "The rule 'lawa' has no setting 'schedule', but window"),
        ({'rule': 'lawa'}, "The rule 'lawa' needs the setting 'window'"),
        ({'rule': 'training', 'options': {'lag': 1.0}}, "The rule 'training' has no setting 'lag', but none at all."),
        ({'rule': 'decay_merge', 'options': {'decay': 'cosine'}}, "The rule 'decay_merge' needs the setting 'window'"),
        ({'rule': 'swa_window', 'options': {'period': 4}}, "The rule 'swa_window' needs the setting 'horizon'"),
        ({'rule': 'ema', 'update_freq': 0}, 'update_freq must be at least 1, but is 0'),
        ({'rule': 'ema', 'update_after': -1}, 'update_after must be at least .*, but is -1'),
    ],
)
def test_what_makes_no_setting(arguments, message):
    with pytest.raises(ValueError, match=message):
        Setting(**arguments)


@pytest.mark.parametrize('name', ['update_freq', 'update_after'])
@pytest.mark.parametrize('value', [2.5, '2', True])
def test_steps_are_whole_numbers(name, value):
    with pytest.raises(TypeError, match=f'{name} must be a whole number, but is {value!r}'):
        Setting('ema', **{name: value})


@pytest.mark.parametrize(
    ('rule', 'options', 'error', 'message'),
    [
        ('bema', {'ema_power': '0.5'}, TypeError, "ema_power must be a number, but is '0.5'"),
        ('bema', {'lag': None}, TypeError, 'lag must be a number, but is None'),
        ('bema', {'bias_power': -1}, ValueError, 'bias_power must be at least 0 and finite, but is -1'),
        ('bema', {'half_life': 0}, ValueError, 'half_life must be positive'),
        ('ema', {'min_ema_multiplier': 2}, ValueError, 'min_ema_multiplier must be between 0 and 1, but is 2'),
        ('ema', {'smoothing': 1}, ValueError, 'smoothing must be below 1'),
        ('ema', {'smoothing': 0.5, 'half_life': 2}, ValueError, 'half_life and smoothing both fix the rate'),
        ('dema', {'ema_power': None}, ValueError, 'DEMA is an average of EMAs'),
        ('ouema', {'bias_power': 0}, ValueError, 'bias_power must be positive'),
        ('lawa', {'window': 0}, ValueError, 'window must be at least 1, but is 0'),
        ('lawa', {'window': 2.0}, TypeError, r'window must be a whole number, but is 2\.0'),
        ('decay_merge', {'window': 2, 'decay': 'cos'}, ValueError, "decay must be one of linear, .*, but is 'cos'"),
        ('swa_window', {'horizon': 'all'}, TypeError, "horizon must be a whole number, but is 'all'"),
        ('swa_window', {'horizon': 8, 'period': 0}, ValueError, 'period must be at least 1, but is 0'),
        ('swa_window', {'horizon': 7}, ValueError, 'horizon is 7, which is no multiple of the 4 steps between'),
        (
            'swa_window',
            {'horizon': 12, 'period': 6},
            ValueError,
            'period is 6, which is no multiple of the 4 steps between',
        ),
        ('swa_window', {'horizon': 12, 'period': 8}, ValueError, 'horizon is 12, which is no multiple of period, 8'),
        ('ema', {'schedule': 'trl'}, ValueError, "schedule must be one of paper, reference, but is 'trl'"),
        ('ema', {'ema_update_after': 3}, ValueError, "ema_update_after belongs to schedule='reference'"),
        (
            'ema',
            {'schedule': 'reference', 'ema_update_after': 'late'},
            TypeError,
            "ema_update_after must be a whole number, but is 'late'",
        ),
        (
            'ema',
            {'schedule': 'reference', 'ema_update_after': -2},
            ValueError,
            'ema_update_after must be at least .*, but is -2',
        ),
        ('bema', {'schedule': 'reference', 'half_life': 2}, ValueError, 'leave out half_life and smoothing'),
        ('dema', {'schedule': 'reference', 'smoothing': 0.5}, ValueError, 'leave out half_life and smoothing'),
    ],
)
def test_what_makes_no_rule(rule, options, error, message):
    with pytest.raises(error, match=message):
        Setting(rule, options).build(4)


CONSTANT_RATES = {'half_life': 5, 'smoothing': 0.5, 'ema_power': None}


@pytest.mark.parametrize(
    ('rule', 'rate', 'idle', 'others'),
    [
        *((rule, 'half_life', name, {}) for rule in ('bema', 'ema', 'ouema', 'dema') for name in POWERS_OF_BETA),
        *((rule, 'smoothing', name, {}) for rule in ('ema', 'dema') for name in POWERS_OF_BETA),
        *((rule, 'ema_power', 'min_ema_multiplier', {}) for rule in ('bema', 'ema', 'ouema')),
        # No power is left.
        *(('ema', rate, name, {}) for rate in CONSTANT_RATES for name in ('lag', 'multiplier')),
        *(('dema', rate, name, {}) for rate in ('half_life', 'smoothing') for name in ('lag', 'multiplier')),
        *(
            (rule, rate, name, {'bias_power': None})
            for rule in ('bema', 'ouema')
            for rate in ('half_life', 'ema_power')
            for name in ('lag', 'multiplier')
        ),
        # Only alpha is one, and has no multiplier.
        ('ouema', 'half_life', 'multiplier', {}),
        ('ouema', 'ema_power', 'multiplier', {}),
        ('bema', 'ema_power', 'multiplier', {'schedule': 'reference'}),
        ('bema', 'ema_power', 'ema_update_after', {'schedule': 'reference'}),
    ],
)
def test_what_has_no_effect(rule, rate, idle, others):
    """Whatever its value, even the default."""
    value = CONSTANT_RATES[rate]
    with pytest.raises(ValueError, match=rf'^{idle} has no effect beside {rate}={value}: leave out one of them\.$'):
        Setting(rule, {rate: value, idle: 1, **others}).build(4)
    assert Setting(rule, {rate: value, **others}).build(4)


@pytest.mark.parametrize(
    ('rule', 'options'),
    [
        ('bema', {'half_life': 5, 'lag': 1, 'multiplier': 2}),
        ('bema', {'ema_power': None, 'lag': 1, 'multiplier': 2}),
        ('bema', {'ema_power': None, 'lag': 1, 'schedule': 'reference'}),
        ('ouema', {'half_life': 5, 'lag': 1}),
        ('ema', {'ema_power': None}),
        ('ema', {'half_life': None, 'smoothing': None, 'ema_power': 0.1, 'lag': 1}),
    ],
)
def test_what_serves_alpha_has_an_effect(rule, options):
    assert Setting(rule, options).build(4) != Setting(rule).build(4)


# What has an effect


BOTH = {'lag': 10.0, 'multiplier': 1.0, 'half_life': None, 'schedule': 'paper'}
CONSTANT = {'smoothing': None, 'schedule': 'paper'}


@pytest.mark.parametrize(
    ('rule', 'options', 'expected'),
    [
        ('bema', {'lag': 1}, {**BOTH, 'ema_power': 0.5, 'bias_power': 0.2, 'min_ema_multiplier': 0.0, 'lag': 1}),
        ('bema', {'half_life': 5}, {**BOTH, 'bias_power': 0.2, 'half_life': 5}),
        ('bema', {'ema_power': None}, {**BOTH, 'bias_power': 0.2, 'ema_power': None}),
        ('ema', {'half_life': 5}, {**CONSTANT, 'half_life': 5}),
        ('dema', {'smoothing': 0.5}, {**CONSTANT, 'smoothing': 0.5, 'half_life': None}),
        (
            'ouema',
            {'ema_power': None, 'schedule': 'reference'},
            {'ema_power': None, 'bias_power': 0.2, 'half_life': None, 'lag': 10.0, 'schedule': 'reference'},
        ),
        (
            'ema',
            {'schedule': 'reference'},
            {
                'ema_power': 0.5,
                'lag': 10.0,
                'multiplier': 1.0,
                'min_ema_multiplier': 0.0,
                'half_life': None,
                'smoothing': None,
                'schedule': 'reference',
                'ema_update_after': 3,
            },
        ),
        ('lawa', {'window': 4}, {'window': 4}),
        ('decay_merge', {'window': 4}, {'window': 4, 'decay': 'linear'}),
        ('swa_window', {'horizon': 8}, {'horizon': 8, 'period': 8}),
        ('swa_window', {'horizon': 8, 'period': 4}, {'horizon': 8, 'period': 4}),
    ],
)
def test_the_settings_that_have_an_effect(rule, options, expected):
    """They make the same average, with what would otherwise be known to this version alone."""
    setting = Setting(rule, options, update_after=3)
    assert setting.effective == expected
    assert Setting(rule, expected, update_after=3).build(4) == setting.build(4)


def test_periods_need_even_spacing():
    with pytest.raises(ValueError, match='swa_window needs checkpoints that are evenly spaced: give an update_freq'):
        Setting('swa_window', {'horizon': 8}).build(None)


# The schedules of the reference


@pytest.mark.parametrize(
    ('options', 'update_after', 'step', 'alpha', 'beta'),
    [
        # (1 + t + 10)^-1/2 and (1 + 2 (t + 10))^-1/2 at t = 14 and t = 2.
        ({'bias_power': 0.5, 'multiplier': 2}, 0, 14, 1 / 5, 1 / 7),
        ({'bias_power': 0.5, 'multiplier': 2}, 0, 2, 13**-0.5, 1 / 5),
        # tau is subtracted from t: 5 steps after it, with rho = 3.
        ({'bias_power': 0.5, 'lag': 3, 'multiplier': 3}, 100, 105, 1 / 3, 1 / 5),
        # beta counts from its own step, and until then as if a step had been done: 16^-1/2, while alpha is 7^-1/2.
        ({'bias_power': 0.5, 'lag': 1, 'multiplier': 15, 'ema_update_after': 9}, 0, 5, 7**-0.5, 1 / 4),
        ({'bias_power': 0.5, 'lag': 0, 'multiplier': 3, 'ema_update_after': 0}, 16, 24, 1 / 3, 73**-0.5),
        # The floor is one of beta alone.
        ({'bias_power': 2, 'lag': 0, 'min_ema_multiplier': 0.5}, 0, 99, 1e-4, 0.5),
        # No EMA, and no bias that fades.
        ({'bias_power': 0, 'ema_power': None}, 0, 7, 1, 1),
    ],
)
def test_the_schedules_of_the_reference_by_hand(options, update_after, step, alpha, beta):
    rule = Setting('bema', {**options, 'schedule': 'reference'}, update_after=update_after).build(None)
    coefficients = rule.linear_step(step, 1.0, 0).coefficients
    assert coefficients == pytest.approx({'alpha': alpha, 'beta': beta}, rel=0, abs=1e-12)


@pytest.mark.parametrize('rule', ['ema', 'dema', 'ouema'])
def test_the_betas_of_the_reference_are_those_of_all_rules(rule):
    """(1 + max(t - tau + rho, 1))^-1/2 is 1/4 at t = 8, tau = 3 and rho = 10."""
    built = Setting(rule, {'schedule': 'reference'}, update_after=3).build(None)
    assert built.linear_step(8, 1.0, 0).coefficients['beta'] == 1 / 4


@pytest.mark.parametrize('cls', ['BEMA', 'OUEMA', 'DEMA'])
def test_the_schedules_of_the_reference_are_the_golden_ones(golden, cls):
    """Those of the published code at all of its updates; of OUEMA it records 1 / (1 - alpha)."""
    offline = golden('abblock_offline')
    configs = {id: config for id, config in offline.configs.items() if config['cls'] == f'core_offline.{cls}'}
    assert len(configs) >= 6
    for id, config in configs.items():
        arrays, kwargs = offline.of(id), config['kwargs']
        options = {
            'schedule': 'reference',
            'ema_power': kwargs['ema_power'] if kwargs['ema_power'] > 0 else None,
        }
        if cls != 'DEMA':
            options['bias_power'] = kwargs['eta_power'] if kwargs['eta_power'] >= 0 else None
        if options['ema_power'] is not None:
            options |= {
                'multiplier': kwargs['ema_gamma'],
                'min_ema_multiplier': kwargs['min_ema_multiplier'],
                'ema_update_after': kwargs['ema_update_after'],
            }
        if options['ema_power'] is not None or options.get('bias_power') is not None:
            options['lag'] = kwargs['scaling_lag']
        rule = Setting(cls.lower(), options, update_after=kwargs['update_after']).build(None)
        updated = np.flatnonzero(arrays['updated'])
        used = [rule.linear_step(int(offline.arrays['steps'][row]), 5.0, 0).coefficients for row in updated]
        betas = np.nan_to_num(arrays['beta'][updated], nan=1.0)
        np.testing.assert_allclose([each['beta'] for each in used], betas, rtol=0, atol=1e-12, err_msg=id)
        if cls == 'BEMA' and 'alpha' in used[0]:
            alphas = arrays['alpha'][updated]
            np.testing.assert_allclose([each['alpha'] for each in used], alphas, rtol=0, atol=1e-12, err_msg=id)
        if cls == 'OUEMA' and 'alpha' in used[0]:
            factors = [1 / (1 - each['alpha']) for each in used]
            np.testing.assert_allclose(factors, arrays['mult1'][updated], rtol=0, atol=1e-12, err_msg=id)
