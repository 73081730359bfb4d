# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the studies say of several seeds, on curves made up for the purpose."""

import math

import click
import pytest

from benchmarks.over_seeds import (
    best_settings,
    curve_over_seeds,
    describe,
    markdown,
    parse_seeds,
    read_lines,
    standard_error,
    steps_saved,
    steps_to_best_ema,
    table_of_seeds,
    table_of_steps,
    write_lines,
)


def one_seed(training, ema, bema, seed=1):
    values = zip(training, ema, bema, strict=True)
    return [
        {'seed': seed, 'step': 10 * number, 'training': t, 'ema': e, 'bema': b}
        for number, (t, e, b) in enumerate(values, start=1)
    ]


def cells(table):
    """The rows of a Markdown table below its head."""
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()[2:]]


def test_steps_are_counted_to_the_best_loss_of_the_ema():
    """The EMA is best at step 40, and BEMA is as low at step 20; what comes after does not matter."""
    records = one_seed([3, 3, 3, 3, 3], ema=[3, 2.5, 2, 1.5, 1.6], bema=[2, 1.5, 1.7, 1.4, 1.7])
    assert steps_to_best_ema(records) == {'training': None, 'ema': 40, 'bema': 20}
    assert steps_saved(records) == 20


def test_steps_saved_are_negative_where_bema_is_later_and_none_where_it_never_comes():
    assert steps_saved(one_seed([3, 3, 3], ema=[2, 1, 2], bema=[2, 2, 1])) == -10
    assert steps_saved(one_seed([3, 3, 3], ema=[2, 1, 2], bema=[2, 2, 1.1])) is None


def test_the_first_of_equal_losses_of_the_ema_counts():
    assert steps_to_best_ema(one_seed([1, 0, 3], ema=[2, 1, 1], bema=[2, 2, 1])) == {
        'training': 10,
        'ema': 20,
        'bema': 30,
    }


def test_settings_are_chosen_by_the_lowest_loss_at_the_step_that_is_asked_for():
    rows = [
        {'rule': 'ema', 'half_life': 5, 'step': 100, 'loss': 1.0},
        {'rule': 'ema', 'half_life': 9, 'step': 100, 'loss': 1.5},
        {'rule': 'ema', 'half_life': 5, 'step': 200, 'loss': 0.9},
        {'rule': 'ema', 'half_life': 9, 'step': 200, 'loss': 0.8},
        {'rule': 'bema', 'ema_power': 0.5, 'bias_power': 0.2, 'step': 200, 'loss': 0.1},
    ]
    assert best_settings(rows, 100, 'loss') == {'ema': {'rule': 'ema', 'half_life': 5}}
    assert best_settings(rows, 200, 'loss') == {
        'ema': {'rule': 'ema', 'half_life': 9},
        'bema': {'rule': 'bema', 'ema_power': 0.5, 'bias_power': 0.2},
    }


def test_the_spread_is_the_standard_error_between_seeds():
    # The deviations of 1, 2 and 3 from their mean are -1, 0 and 1: a variance of 2 / 2, over three seeds.
    assert standard_error([1, 2, 3]) == pytest.approx(math.sqrt(1 / 3))
    assert math.isnan(standard_error([1]))
    records = [{'step': step, 'ema': step + seed} for seed in (1, 2, 3) for step in (20, 10)]
    error = pytest.approx(math.sqrt(1 / 3))
    assert curve_over_seeds(records, 'ema') == [(10, 12, error), (20, 22, error)]


def test_tables_show_every_seed_and_then_the_spread():
    records = [{'seed': seed, 'ema': float(seed)} for seed in (1, 2, 3)]
    assert cells(table_of_seeds(records, ['ema'])) == [
        ['1', '1.0000'],
        ['2', '2.0000'],
        ['3', '3.0000'],
        ['mean', '2.0000'],
        ['standard error', '0.5774'],
    ]


def test_the_table_of_steps_has_a_mean_only_where_every_seed_has_a_number():
    reached = one_seed([3, 3], ema=[2, 1], bema=[1, 1]) + one_seed([3, 3], ema=[2, 1], bema=[2, 1], seed=2)
    never = one_seed([3, 3], ema=[2, 1], bema=[2, 2], seed=3)
    assert [row[-1] for row in cells(table_of_steps(reached))] == ['10', '0', '5.0', '5.0']
    assert [row[-1] for row in cells(table_of_steps(reached + never))] == ['10', '0', '-']


def test_settings_and_values_read_well():
    assert describe({'rule': 'bema', 'half_life': 250, 'bias_power': 0.6}) == 'BEMA, half_life 250, bias_power 0.6'
    assert cells(markdown([{'loss': 0.25, 'step': 5}, {'loss': None, 'step': 10}])) == [['0.2500', '5'], ['-', '10']]


def test_lines_come_back_as_they_were(tmp_path):
    rows = [{'seed': 1, 'loss': 0.1}, {'seed': 2, 'loss': None}]
    write_lines(tmp_path / 'x.jsonl', rows)
    assert read_lines(tmp_path / 'x.jsonl') == rows


def test_seeds_are_integers():
    context, option = click.Context(click.Command('study')), click.Option(['--seeds'])
    assert parse_seeds(context, option, '1,2') == [1, 2]
    with pytest.raises(click.BadParameter, match="not '1;2'"):
        parse_seeds(context, option, '1;2')
