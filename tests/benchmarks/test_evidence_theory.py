# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The theory of the averages: closed forms, exact errors, simulation and likelihood must agree."""

import csv
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import evidence_theory as theory
from benchmarks.evidence_theory import (
    GRID,
    INTERVAL,
    STEPS,
    Average,
    Direction,
    bema_error,
    constant_rate_error,
    direction_of,
    exact_bema,
    exact_errors,
    iterate_average_error,
    last_iterate_error,
    one_curvature,
    several_curvatures,
)
from composer_bema.averaging import bema_rule, ema_rule

ROOT = Path(__file__).parents[2]

CASES = [(1e-4, 10.0), (1e-3, 0.1), (1e-2, 0.001)]


@pytest.mark.parametrize(('curvature', 'noise'), CASES)
def test_closed_forms_are_the_exact_errors_of_the_rules_of_the_package(curvature, noise):
    problem, direction = one_curvature(curvature, noise), direction_of(curvature, noise)
    for average, form in [
        (theory.FIXED['last iterate'], last_iterate_error),
        (theory.FIXED['iterate average'], iterate_average_error),
        (Average(ema_rule(half_life=700)), lambda *case: constant_rate_error(*case, half_life=700)),
        (exact_bema(curvature), lambda *case: bema_error(*case, assumed=curvature)),
        (exact_bema(curvature / 4), lambda *case: bema_error(*case, assumed=curvature / 4)),
    ]:
        steps = [INTERVAL, 350, STEPS]
        expected = [form(direction, step) for step in steps]
        assert exact_errors(problem, average.rows(steps)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(('curvature', 'noise'), CASES)
def test_closed_forms_tend_to_those_of_continuous_time(curvature, noise):
    """As the docstrings state them, and as integrals over the weights that the averages give to each moment."""
    a, sigma, end, rate, assumed = curvature, direction_of(curvature, noise).sigma, 2000.0, 1e-3, 3e-4
    direction, short = Direction(a, sigma), 0.01
    e, r = math.exp(-a * end), math.exp(-rate * end)

    average = ((1 - e) / (a * end)) ** 2
    average += sigma**2 / (a**2 * end) * (1 - 2 * (1 - e) / (a * end) + (1 - e**2) / (2 * a * end))
    assert iterate_average_error(direction, end, short) == pytest.approx(average, rel=1e-4)
    assert average == pytest.approx(integrated(direction, end, lambda t: 1 / end + 0 * t), rel=1e-4)

    assert bema_error(direction, end, a, short) == pytest.approx(sigma**2 / (a**2 * end), rel=1e-4)
    numeric = integrated(direction, end, lambda t: 1 / end + 0 * t, -1 / (a * end), 1 / (a * end))
    assert numeric == pytest.approx(sigma**2 / (a**2 * end), rel=1e-4)
    numeric = integrated(direction, end, lambda t: 1 / end + 0 * t, -1 / (assumed * end), 1 / (assumed * end))
    assert bema_error(direction, end, assumed, short) == pytest.approx(numeric, rel=1e-4)

    half_life = math.log(2) / (3 * rate)
    numeric = integrated(
        direction, end, lambda t: 3 * rate * np.exp(-3 * rate * (end - t)), first=math.exp(-3 * rate * end)
    )
    assert constant_rate_error(direction, end, half_life, short) == pytest.approx(numeric, rel=1e-4)
    rate, r = 3 * rate, r**3
    bias = (rate * e - a * r) / (rate - a)
    spread = (1 - e**2) / (2 * a) - 2 * (1 - e * r) / (a + rate) + (1 - r**2) / (2 * rate)
    assert bias**2 + (sigma * rate / (rate - a)) ** 2 * spread == pytest.approx(numeric, rel=1e-4)


def integrated(direction, end, density, first=0.0, last=0.0):
    """The error of an average with this density over time and these weights at its ends, by the trapezoidal rule."""
    times = np.linspace(0, end, 1001)
    weights = density(times) * (times[1] - times[0])
    weights[[0, -1]] /= 2
    weights[[0, -1]] += first, last
    a = direction.curvature
    apart, together = np.abs(times[:, None] - times), times[:, None] + times
    covariances = direction.sigma**2 / (2 * a) * (np.exp(-a * apart) - np.exp(-a * together))
    return (weights @ np.exp(-a * times)) ** 2 + weights @ covariances @ weights


@pytest.mark.parametrize('problem', [one_curvature(1e-3, 0.1), several_curvatures(0.1, 'loss')], ids=['one', 'several'])
def test_the_simulation_has_the_exact_errors(problem, monkeypatch):
    monkeypatch.setattr(theory, 'TUNED', {name: settings[50:52] for name, settings in theory.TUNED.items()})
    records = theory.study(problem, 2000, np.random.default_rng(0))
    names = {record['average'] for record in records}
    assert {'last iterate', 'BEMA, as shipped', 'OUEMA, as shipped', 'DEMA, tuned'} <= names
    for record in records:
        assert abs(record['simulated'] - record['exact']) < 4 * record['standard_error'], record
        assert record['standard_error'] < 0.06 * record['exact'] + 1e-12


def test_paths_have_their_means_and_covariances():
    direction, paths = direction_of(1e-3, 0.5), 20000
    chosen = [1, 10, 100, 1000]
    samples = direction.sample(paths, np.random.default_rng(0))[chosen]
    means, covariances = direction.means()[chosen], theory.covariances(direction)[np.ix_(chosen, chosen)]
    assert np.abs(samples.mean(axis=1) - means).max() < 4 * math.sqrt(0.5 / paths)
    assert np.abs(np.cov(samples) - covariances).max() < 4 * math.sqrt(2 * 0.5**2 / paths)
    assert samples.dtype == np.float64


@pytest.mark.parametrize('curvature', [1e-4, 1e-3, 1e-2])
def test_bema_with_exact_weights_maximises_the_likelihood(curvature):
    path = direction_of(curvature, 0.1).sample(1, np.random.default_rng(1))[:, 0] + 5  # the minimum is 5
    decay = math.exp(-curvature * INTERVAL)

    def log_likelihood(minimum):
        return -np.square(path[1:] - minimum - decay * (path[:-1] - minimum)).sum()

    # Gaussian, and so a parabola: three points have its maximum.
    below, middle, above = (log_likelihood(minimum) for minimum in (-100, 0, 100))
    maximiser = 50 * (below - above) / (below - 2 * middle + above)
    estimate = float(exact_bema(curvature).rows([STEPS])[0] @ path)
    assert estimate == pytest.approx(maximiser, abs=1e-6)
    # The paper's weights, with the trapezoidal rule for the integral: off by the discretisation alone.
    moved = path[-1] - path[0]
    integral = INTERVAL * (path.sum() - (path[0] + path[-1]) / 2)
    paper = moved / (curvature * STEPS) + integral / STEPS
    assert estimate - paper == pytest.approx(moved / (len(GRID) - 1) * curvature * INTERVAL / 12, rel=1e-3)


@pytest.mark.parametrize(('curvature', 'noise'), CASES)
def test_bema_with_exact_weights_is_the_best_unbiased_combination(curvature, noise):
    direction, row = direction_of(curvature, noise), exact_bema(curvature).rows([STEPS])[0]
    means, covariances = direction.means(), theory.covariances(direction)
    assert [row.sum(), row @ means] == pytest.approx([1, 0], abs=1e-9)
    # The start is known, and its weight follows from the others': with theta_0 - mu = 1 they need c^T (1 - m) = 1, and
    # the least c^T C c is then 1 / (1 - m)^T C^-1 (1 - m).
    gap = 1 - means[1:]
    least = 1 / (gap @ np.linalg.solve(covariances[1:, 1:], gap))
    assert row @ covariances @ row == pytest.approx(least, rel=1e-6)
    coth = 1 / math.tanh(curvature * INTERVAL / 2)
    expected = direction.sigma**2 * INTERVAL * coth / (2 * curvature * STEPS)
    assert row @ covariances @ row == pytest.approx(expected, rel=1e-9)
    exact_ouema = theory.exact_ouema(curvature).rows([STEPS])
    assert [exact_ouema.sum(), exact_ouema[0] @ means] == pytest.approx([1, 0], abs=1e-9)
    assert exact_errors(one_curvature(curvature, noise), exact_ouema)[0] > expected


def test_settings_of_the_package_are_exact_where_an_update_is_a_half_life_of_the_weights():
    update_freq = 400
    direction = direction_of(math.log(2) / update_freq, 0.1)
    rule = bema_rule(ema_power=1, bias_power=1, lag=0, multiplier=1 / update_freq)
    row = Average(rule, update_freq).rows([STEPS])[0]
    assert [row.sum(), row @ direction.means()] == pytest.approx([1, 0], abs=1e-9)
    least = direction.sigma**2 / (direction.curvature**2 * STEPS)
    assert row @ theory.covariances(direction) @ row / least == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize('curvature', [1e-4, 1e-3, 1e-2])
def test_the_iterate_average_wins_where_the_noise_is_more_than_the_page_says(curvature):
    e = math.exp(-curvature * STEPS)
    threshold = (1 - e) / (3 - e)
    for factor, wins in [(0.99, False), (1.01, True)]:
        direction = direction_of(curvature, factor * threshold)
        average = iterate_average_error(direction, STEPS, interval=0.1)
        assert (average < bema_error(direction, STEPS, curvature, interval=0.1)) is wins


@pytest.mark.parametrize(('factor', 'ratio'), [(1 / 4, 9), (1 / 2, 1), (4, 9 / 16), (1e4, 1)])
def test_the_bias_of_a_wrong_curvature_is_that_of_the_iterate_average_times_a_factor(factor, ratio):
    quiet = Direction(1e-3, sigma=0)
    wrong = bema_error(quiet, STEPS, factor * 1e-3, interval=0.01)
    assert wrong / iterate_average_error(quiet, STEPS, interval=0.01) == pytest.approx(ratio, rel=1e-3)


def test_the_tuned_average_is_the_best_of_its_settings(monkeypatch):
    monkeypatch.setattr(theory, 'TUNED', {'EMA, tuned': theory.TUNED['EMA, tuned']})
    problem = one_curvature(1e-3, 0.1)
    errors = [constant_rate_error(problem.directions[0], STEPS, half_life) for half_life in theory.FINE]
    best = theory.averages_of(problem)['EMA, tuned']
    assert theory.setting_of(best) == f'{theory.FINE[int(np.argmin(errors))]:.3g}'


@pytest.mark.parametrize('measure', ['loss', 'distance'])
def test_the_error_of_several_curvatures_starts_at_one(measure):
    row = np.zeros((1, len(GRID)))
    row[0, 0] = 1
    assert exact_errors(several_curvatures(10.0, measure), row) == pytest.approx([1])


def test_the_command_leaves_its_tables_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, 'TUNED', {name: settings[50:52] for name, settings in theory.TUNED.items()})
    monkeypatch.setattr(theory, 'problems', lambda: [one_curvature(1e-3, 0.1), several_curvatures(0.1, 'loss')])
    result = CliRunner().invoke(theory.main, ['--paths', '10', '--out', str(tmp_path / 'out')], catch_exceptions=False)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['curves.csv', 'tables.md', 'theory.png']
    assert (tmp_path / 'out/tables.md').read_text() in result.output
    # 0.02 is sigma^2 / (a^2 T).
    assert '| aT = 10 |     0.1 |            0.0269 |             0.131 |      **0.02** |' in result.output
    with (tmp_path / 'out/curves.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    (row,) = [r for r in rows if (r['average'], r['step'], r['curvature']) == ('BEMA, exact', '10000', '0.001')]
    assert float(row['exact']) == pytest.approx(0.02, rel=1e-4)
    assert float(row['closed_form']) == pytest.approx(float(row['exact']))


def test_the_page_has_the_errors_that_need_no_tuning(monkeypatch):
    monkeypatch.setattr(theory, 'TUNED', {})
    results = {}
    for problem in theory.problems():
        averages = theory.averages_of(problem)
        errors = exact_errors(problem, np.stack([theory.last_row(average) for average in averages.values()]))
        results[problem] = [{'average': n, 'step': STEPS, 'exact': e} for n, e in zip(averages, errors, strict=True)]
    one = {problem: records for problem, records in results.items() if problem.curvature is not None}
    tables = [theory.errors_table(results, theory.SHIPPED), theory.errors_table(one, theory.WRONG)]
    page = ''.join(path.read_text() for path in sorted((ROOT / 'docs').glob('evidence*.md')))
    for row in itertools.chain.from_iterable(table.splitlines()[2:] for table in tables):
        assert re.sub(' +', ' ', row) in page
