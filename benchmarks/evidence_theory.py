# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

r"""The averages on stochastic quadratics, where their mean squared errors are known: exact values and a simulation.

    python benchmarks/evidence_theory.py
    python benchmarks/evidence_theory.py --paths 20000 --seed 1

About a minute on two cores; nothing is trained. The weights of one direction of a quadratic follow the
Ornstein-Uhlenbeck process :math:`d\theta = -a (\theta - \mu) dt + \sigma dW`, whose time t counts optimizer steps, and
which sampled every :math:`\delta` steps is an AR(1) process. An average of the package is a row of coefficients c
of those samples, so its mean squared error is :math:`(c^T m)^2 + c^T C c` with their means m and covariances C. That is
computed for every average, held against closed forms where there are some, and against simulated paths.

The tables and the picture go to runs/evidence/theory. Errors are in units of the squared distance that the weights
start from the minimum, and the noise is the variance :math:`\sigma^2 / 2a` of weights that have forgotten their start.
"""

import csv
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

import click
import numpy as np
from tabulate import tabulate

from composer_bema.averaging import (
    BEMA,
    DEFAULTS,
    EMA,
    OUEMA,
    HalfLifeDecay,
    Rule,
    bema_rule,
    dema_rule,
    ema_rule,
    fold,
    ouema_rule,
)
from composer_bema.plots import plot_log_panels

OUT = Path('runs/evidence/theory')

STEPS = 10_000
INTERVAL = 10  # delta, from one sample to the next, in steps
GRID = np.arange(0, STEPS + 1, INTERVAL)

CURVATURES = (1e-4, 1e-3, 1e-2)  # a, per step
NOISES = (0.001, 0.1, 10.0)  # the variance that the noise settles at
# Five directions of one quadratic, of the condition number 100.
MEASURES = ('loss', 'distance')
SEVERAL = tuple(float(curvature) for curvature in np.geomspace(CURVATURES[0], CURVATURES[-1], 5))

# Points of a curve, of which every so many have a marker for the simulation.
POINTS = 40
MARKED = 6

# The columns of the tables.
EACH_EXACT = 'BEMA, each exact'
ESTIMATES = ('last iterate', 'iterate average', 'EMA, tuned', 'DEMA, tuned', 'OUEMA, tuned', 'BEMA, tuned')
MAIN = (*ESTIMATES, 'OUEMA, exact', 'BEMA, exact')
SHIPPED = (
    'last iterate',
    *(f'{method}, as shipped' for method in ('EMA', 'DEMA', 'OUEMA', 'BEMA')),
    'EMA, default powers',
    'BEMA, default powers',
)
WRONG = ('iterate average', 'BEMA, for a / 4', 'BEMA, exact', 'BEMA, for 4 a')
ONE_FOR_ALL = (*ESTIMATES, *(f'BEMA, for a = {a:g}' for a in CURVATURES), EACH_EXACT)

# The lines of the picture, and how they are drawn.
SIMULATION, CLOSED_FORM = 'simulation', 'closed form'
LINES = {
    'last iterate': {'color': 'tab:cyan'},
    'iterate average': {'color': 'tab:brown'},
    'EMA, tuned': {'color': 'tab:blue'},
    'EMA, as shipped': {'color': 'tab:blue', 'linestyle': '--'},
    'DEMA, tuned': {'color': 'tab:green'},
    'OUEMA, tuned': {'color': 'tab:purple'},
    'BEMA, tuned': {'color': 'tab:orange'},
    'BEMA, as shipped': {'color': 'tab:orange', 'linestyle': '--'},
    'BEMA, exact': {'color': 'tab:red', 'linewidth': 2},
}
STYLES: dict[str, dict[str, Any]] = {
    **LINES,
    CLOSED_FORM: {'color': 'black', 'linestyle': ':', 'linewidth': 1},
    SIMULATION: {'color': 'black', 'linestyle': '', 'marker': 'o', 'markersize': 2.5, 'markerfacecolor': 'white'},
}

Record = dict[str, Any]


class Direction(NamedTuple):
    """One direction of a quadratic with the minimum 0, from weights at the distance 1."""

    curvature: float
    sigma: float

    @property
    def settled(self) -> float:
        """The variance of weights that have forgotten their start."""
        return self.sigma**2 / (2 * self.curvature)

    def means(self) -> np.ndarray:
        """The means of the samples."""
        return np.exp(-self.curvature * GRID)

    def sample(self, paths: int, generator: np.random.Generator) -> np.ndarray:
        """Paths, in float64, of the shape (samples, paths); exact, however long the interval is."""
        decay = math.exp(-self.curvature * INTERVAL)
        thetas = generator.normal(scale=math.sqrt(innovation(self, INTERVAL)), size=(len(GRID), paths))
        thetas[0] = 1
        for before, after in itertools.pairwise(thetas):
            after += decay * before
        return thetas


@lru_cache(maxsize=len(SEVERAL))
def covariances(direction: Direction) -> np.ndarray:
    """The covariances of the samples, :math:`(e^{-a |t - s|} - e^{-a (t + s)}) sigma^2 / 2a`."""
    apart, together = np.abs(GRID[:, None] - GRID), GRID[:, None] + GRID
    return direction.settled * (np.exp(-direction.curvature * apart) - np.exp(-direction.curvature * together))


class Problem(NamedTuple):
    """A quadratic, and what each direction counts in its error; the errors before the first step add up to 1."""

    curvature: Optional[float]
    """None where there are several."""
    measure: str
    noise: float
    directions: tuple[Direction, ...]
    weights: tuple[float, ...]


def direction_of(curvature: float, noise: float) -> Direction:
    """The direction in which the noise settles at this variance."""
    return Direction(curvature, math.sqrt(2 * curvature * noise))


def one_curvature(curvature: float, noise: float) -> Problem:
    """A quadratic of one direction."""
    return Problem(curvature, 'distance', noise, (direction_of(curvature, noise),), (1.0,))


def several_curvatures(noise: float, measure: str) -> Problem:
    """A quadratic of five directions with the same sigma, that of the given noise in the middle one.

    Args:
        noise: The variance at which the noise settles in the middle direction.
        measure: ``'distance'`` counts all directions alike, and ``'loss'`` by their curvature.
    """
    sigma = direction_of(SEVERAL[len(SEVERAL) // 2], noise).sigma
    shares = SEVERAL if measure == 'loss' else [1.0] * len(SEVERAL)
    weights = tuple(share / sum(shares) for share in shares)
    return Problem(None, measure, noise, tuple(Direction(a, sigma) for a in SEVERAL), weights)


@dataclass(frozen=True)
class InverseTime:
    """The coefficient ``time / t``. The package's own schedules never exceed 1, and a correction of 1 / (a t) may."""

    time: float

    def __call__(self, step: int, elapsed: float) -> float:
        return self.time / step


@dataclass(frozen=True)
class Forgetting:
    """The coefficient ``exp(-a t)``: what the process remembers of its start."""

    curvature: float

    def __call__(self, step: int, elapsed: float) -> float:
        return math.exp(-self.curvature * step)


@dataclass(frozen=True)
class Average:
    """A rule of the package, updated every so many steps from step 0."""

    rule: Rule
    update_freq: int = INTERVAL

    def report_steps(self) -> list[int]:
        """Steps of updates, evenly spaced in the logarithm, of which STEPS is the last."""
        updates = np.geomspace(1, STEPS // self.update_freq, POINTS).round().astype(int)
        return [int(update) * self.update_freq for update in np.unique(updates)]

    def rows(self, steps: Sequence[int]) -> np.ndarray:
        """The coefficients of the samples after these updates, of the shape (steps, samples)."""
        updates = range(self.update_freq, STEPS + 1, self.update_freq)
        folded = fold(self.rule, 0, updates)
        rows = np.zeros((len(updates), len(GRID)))
        rows[:, :: self.update_freq // INTERVAL] = folded
        return rows[[step // self.update_freq - 1 for step in steps]]


@cache
def last_row(average: Average) -> np.ndarray:
    """The coefficients at the last step."""
    return average.rows([STEPS])[0]


def mean_of_iterates() -> Average:
    """The plain mean of the samples after step 0."""
    return Average(ema_rule(ema_power=1, lag=0, multiplier=1 / INTERVAL))


def exact_bema(curvature: float) -> Average:
    r"""BEMA with the exact weights: the maximum likelihood estimate of the minimum from a sampled path.

    From :math:`\theta_{k+1} - \mu = \varphi (\theta_k - \mu) + \varepsilon_k` with :math:`\varphi = e^{-a \delta}` the
    likelihood is largest at the mean of :math:`(\theta_{k+1} - \varphi \theta_k) / (1 - \varphi)` over k < n, which is
    :math:`\frac{1}{n} \sum_{k=1}^n \theta_k + \alpha (\theta_n - \theta_0)` with :math:`\alpha = 1 / (n (e^{a \delta} -
    1))`. As :math:`\delta \to 0` it becomes :math:`(\theta_T - \theta_0) / (a T) + \frac{1}{T} \int_0^T \theta_t dt`.

    Args:
        curvature: a, which is assumed to be known.
    """
    alpha = InverseTime(INTERVAL / math.expm1(curvature * INTERVAL))
    return Average(BEMA(alpha, beta=InverseTime(INTERVAL)))


def exact_ouema(curvature: float) -> Average:
    """The plain mean of the de-biased weights, with the alpha that makes each of them unbiased."""
    return Average(OUEMA(Forgetting(curvature), beta=InverseTime(INTERVAL)))


FIXED = {
    'last iterate': Average(ema_rule(ema_power=None)),
    'iterate average': mean_of_iterates(),
    'EMA, as shipped': Average(ema_rule(), DEFAULTS.update_freq),
    'DEMA, as shipped': Average(dema_rule(), DEFAULTS.update_freq),
    'OUEMA, as shipped': Average(ouema_rule(), DEFAULTS.update_freq),
    'BEMA, as shipped': Average(bema_rule(), DEFAULTS.update_freq),
    'EMA, default powers': Average(ema_rule()),
    'BEMA, default powers': Average(bema_rule()),
}

# 120 settings each; what BEMA and OUEMA spend on eta, the others spend on a finer grid of half-lives, in steps.
FINE = tuple(float(half_life) for half_life in np.geomspace(1, 10 * STEPS, 120))
COARSE = tuple(float(half_life) for half_life in np.geomspace(1, 10 * STEPS, 24))
TUNED = {
    'EMA, tuned': [Average(ema_rule(half_life=h)) for h in FINE],
    'DEMA, tuned': [Average(dema_rule(half_life=h)) for h in FINE],
    'OUEMA, tuned': [
        Average(ouema_rule(half_life=h, bias_power=eta))
        for h, eta in itertools.product(COARSE, (0.1, 0.2, 0.4, 0.6, 0.8))
    ],
    'BEMA, tuned': [
        Average(bema_rule(half_life=h, bias_power=eta))
        for h, eta in itertools.product(COARSE, (0.0, 0.2, 0.4, 0.6, 0.8))
    ],
}


def averages_of(problem: Problem) -> dict[str, Average]:
    """All averages, of which the tuned ones have the lowest exact error at the last step."""
    averages = dict(FIXED)
    for name, settings in TUNED.items():
        errors = exact_errors(problem, np.stack([last_row(setting) for setting in settings]))
        averages[name] = settings[int(errors.argmin())]
    if problem.curvature is None:
        return averages | {f'BEMA, for a = {a:g}': exact_bema(a) for a in CURVATURES}
    return averages | {
        'OUEMA, exact': exact_ouema(problem.curvature),
        'BEMA, exact': exact_bema(problem.curvature),
        'BEMA, for a / 4': exact_bema(problem.curvature / 4),
        'BEMA, for 4 a': exact_bema(problem.curvature * 4),
    }


def exact_errors(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """The mean squared errors of averages, one for each row of their coefficients."""
    errors = np.zeros(len(rows))
    for direction, weight in zip(problem.directions, problem.weights, strict=True):
        errors += weight * ((rows @ direction.means()) ** 2 + ((rows @ covariances(direction)) * rows).sum(axis=1))
    return errors


def simulated_errors(
    problem: Problem, rows: np.ndarray, paths: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The mean squared errors of the same averages over simulated paths, and their standard errors."""
    squares = np.zeros((len(rows), paths))
    for direction, weight in zip(problem.directions, problem.weights, strict=True):
        squares += weight * (rows @ direction.sample(paths, generator)) ** 2
    return squares.mean(axis=1), squares.std(axis=1, ddof=1) / math.sqrt(paths)


def innovation(direction: Direction, interval: float) -> float:
    """The variance that the noise adds from one sample to the next, :math:`(1 - e^{-2 a delta}) sigma^2 / 2a`."""
    return direction.settled * -math.expm1(-2 * direction.curvature * interval)


def last_iterate_error(direction: Direction, step: float) -> float:
    r"""The mean squared error of the weights themselves, :math:`e^{-2aT} + (1 - e^{-2aT}) \sigma^2 / 2a`.

    The mean solves :math:`dm = -a m dt`, and the variance is :math:`\sigma^2 \int_0^T e^{-2au} du`.
    """
    return math.exp(-2 * direction.curvature * step) + innovation(direction, step)


def iterate_average_error(direction: Direction, step: float, interval: float = INTERVAL) -> float:
    r"""The mean squared error of the plain mean of the n samples after the start.

    An innovation that was sampled j intervals before the last sample is in j + 1 samples, and weighs
    :math:`(1 - \varphi^{j+1}) / (n (1 - \varphi))` in their mean, with :math:`\varphi = e^{-a \delta}`; the start
    weighs :math:`\varphi (1 - \varphi^n) / (n (1 - \varphi))`. As :math:`\delta \to 0`, with :math:`e = e^{-aT}`:
    :math:`\left( \frac{1 - e}{aT} \right)^2 + \frac{\sigma^2}{a^2 T} \left( 1 - \frac{2 (1 - e)}{aT} + \frac{1 -
    e^2}{2aT} \right)`.
    """
    count, phi = step / interval, math.exp(-direction.curvature * interval)
    bias = phi * (1 - phi**count) / (count * (1 - phi))
    squares = count - 2 * _powers(phi, count) + _powers(phi**2, count)
    return bias**2 + innovation(direction, interval) * squares / (count * (1 - phi)) ** 2


def constant_rate_error(direction: Direction, step: float, half_life: float, interval: float = INTERVAL) -> float:
    r"""The mean squared error of a constant-rate EMA that starts as the weights at step 0.

    With :math:`q = 1 - \beta = 2^{-\delta / \text{half-life}}` and :math:`\varphi = e^{-a \delta}`, an innovation that
    was sampled j intervals before the last sample weighs :math:`\beta (\varphi^{j+1} - q^{j+1}) / (\varphi - q)`, and
    the start :math:`q^n + \beta \varphi (\varphi^n - q^n) / (\varphi - q)`. As :math:`\delta \to 0`, with the rate
    :math:`r = \ln 2 / \text{half-life} \ne a`, the bias is :math:`(r e^{-aT} - a e^{-rT}) / (r - a)` and the variance
    :math:`\left( \frac{\sigma r}{r - a} \right)^2 \left( \frac{1 - e^{-2aT}}{2a} - \frac{2 (1 - e^{-(a+r)T})}{a + r} +
    \frac{1 - e^{-2rT}}{2r} \right)`.
    """
    count, phi, q = step / interval, math.exp(-direction.curvature * interval), 2 ** (-interval / half_life)
    scale = (1 - q) / (phi - q)
    bias = q**count + scale * phi * (phi**count - q**count)
    squares = _powers(phi**2, count) - 2 * _powers(phi * q, count) + _powers(q**2, count)
    return bias**2 + innovation(direction, interval) * scale**2 * squares


def bema_error(direction: Direction, step: float, assumed: float, interval: float = INTERVAL) -> float:
    r"""The mean squared error of BEMA with the weights that are exact for an assumed curvature.

    Beside the plain mean's, the start has the further weight :math:`\alpha (\varphi^n - 1)`, and an innovation that was
    sampled j intervals before the last sample :math:`\alpha \varphi^j`. As :math:`\delta \to 0` the bias is :math:`(1 -
    e^{-aT}) (1/a - 1/\hat a) / T`. Where the curvature is the assumed one all innovations weigh the same, there is no
    bias, and the error is :math:`\sigma^2 \delta \coth(a \delta / 2) / (2 a T)`, or :math:`\sigma^2 / (a^2 T)` as
    :math:`\delta \to 0`, which by the Cramer-Rao inequality is the least of all unbiased estimates (arXiv 2508.00180).
    """
    count, phi = step / interval, math.exp(-direction.curvature * interval)
    alpha = 1 / (count * math.expm1(assumed * interval))
    mean = 1 / (count * (1 - phi))
    bias = (mean * phi - alpha) * (1 - phi**count)
    # An innovation weighs mean + slope phi^j.
    slope = alpha - mean * phi
    squares = (
        mean**2 * count + 2 * mean * slope * _powers(phi, count) / phi + slope**2 * _powers(phi**2, count) / phi**2
    )
    return bias**2 + innovation(direction, interval) * squares


def _powers(x: float, count: float) -> float:
    """The sum of the first ``count`` powers of x, from x itself."""
    return x * (1 - x**count) / (1 - x)


def closed_form(name: str, average: Average, problem: Problem, step: int) -> Optional[float]:
    """The closed form of an average's mean squared error, if there is one here."""
    rule = average.rule
    if name == 'last iterate':
        return closed_error(problem, lambda direction: last_iterate_error(direction, step))
    if name == 'iterate average':
        return closed_error(problem, lambda direction: iterate_average_error(direction, step))
    if isinstance(rule, EMA) and isinstance(beta := rule.beta, HalfLifeDecay):
        return closed_error(problem, lambda direction: constant_rate_error(direction, step, beta.half_life))
    if isinstance(rule, BEMA) and isinstance(alpha := rule.alpha, InverseTime):
        assumed = math.log1p(INTERVAL / alpha.time) / INTERVAL
        return closed_error(problem, lambda direction: bema_error(direction, step, assumed))
    return None


def closed_error(problem: Problem, form: Callable[[Direction], float]) -> float:
    """The closed form of the error, summed over the directions."""
    pairs = zip(problem.directions, problem.weights, strict=True)
    return sum(weight * form(direction) for direction, weight in pairs)


def problems() -> list[Problem]:
    """All quadratics of the study."""
    return [
        *(one_curvature(a, noise) for noise, a in itertools.product(NOISES, CURVATURES)),
        *(several_curvatures(noise, measure) for measure, noise in itertools.product(MEASURES, NOISES)),
    ]


def study(problem: Problem, paths: int, generator: np.random.Generator) -> list[Record]:
    """A record for each average and step: its exact error, the closed form's, and the simulated one."""
    averages = averages_of(problem)
    keys = [(name, step) for name, average in averages.items() for step in average.report_steps()]
    rows = np.concatenate([average.rows(average.report_steps()) for average in averages.values()])
    columns = exact_errors(problem, rows), *simulated_errors(problem, rows, paths, generator)
    return [
        {
            'curvature': problem.curvature,
            'measure': problem.measure,
            'noise': problem.noise,
            'average': name,
            'setting': setting_of(averages[name]),
            'step': step,
            'exact': float(exact),
            'closed_form': closed_form(name, averages[name], problem, step),
            'simulated': float(simulated),
            'standard_error': float(standard_error),
        }
        for (name, step), exact, simulated, standard_error in zip(keys, *columns, strict=True)
    ]


def setting_of(average: Average) -> str:
    """What is tuned: the half-life in steps, and eta."""
    beta, alpha = getattr(average.rule, 'beta', None), getattr(average.rule, 'alpha', None)
    if not isinstance(beta, HalfLifeDecay):
        return ''
    return f'{beta.half_life:.3g}' + (f', {alpha.power:g}' if alpha else '')


def tables(results: Mapping[Problem, Sequence[Record]]) -> str:
    """What all have come to at the last step, as Markdown."""
    one = {problem: records for problem, records in results.items() if problem.curvature is not None}
    several = {problem: records for problem, records in results.items() if problem.curvature is None}
    parts = {
        'One curvature': errors_table(one, MAIN),
        'One curvature: the settings of the tuned ones, half-life in steps and eta': settings_table(one),
        'One curvature: as shipped, and the default powers with an update at every sample': errors_table(one, SHIPPED),
        'One curvature: the exact weights of another one': errors_table(one, WRONG),
        'Several curvatures': errors_table(several, ONE_FOR_ALL),
        'Several curvatures: the settings of the tuned ones': settings_table(several),
        'Several curvatures: as shipped, and the default powers': errors_table(several, SHIPPED),
        'The simulation': simulation_table(results),
    }
    return '\n'.join(f'{title}:\n\n{table}\n' for title, table in parts.items())


def errors_table(results: Mapping[Problem, Sequence[Record]], columns: Sequence[str]) -> str:
    """The exact mean squared errors at the last step, of each row the least in bold."""
    rows = []
    for problem, records in results.items():
        errors = {record['average']: record['exact'] for record in records if record['step'] == STEPS}
        # No one average: each direction has an alpha of its own.
        errors[EACH_EXACT] = closed_error(problem, lambda direction: bema_error(direction, STEPS, direction.curvature))
        least = min(errors[name] for name in columns if name != EACH_EXACT)
        texts = [f'{errors[name]:.3g}' for name in columns]
        rows.append([*case_of(problem), *(f'**{t}**' if t == f'{least:.3g}' else t for t in texts)])
    return markdown(rows, ['', 'noise', *columns])


def settings_table(results: Mapping[Problem, Sequence[Record]]) -> str:
    """What was chosen for each problem."""
    rows = []
    for problem, records in results.items():
        settings = {record['average']: record['setting'] for record in records}
        rows.append([*case_of(problem), *(settings[name] for name in TUNED)])
    return markdown(rows, ['', 'noise', *TUNED])


def simulation_table(results: Mapping[Problem, Sequence[Record]]) -> str:
    """How far the simulation and the closed forms are from the exact errors."""
    records = list(itertools.chain.from_iterable(results.values()))
    deviations = np.array([(r['simulated'] - r['exact']) / r['standard_error'] for r in records])
    closed = [abs(r['closed_form'] / r['exact'] - 1) for r in records if r['closed_form'] is not None]
    rows = [
        ['errors simulated', len(records)],
        ['root mean square of their deviations, in standard errors', f'{np.sqrt((deviations**2).mean()):.2f}'],
        ['part of them within two standard errors', f'{(np.abs(deviations) < 2).mean():.3f}'],
        ['largest of them, in standard errors', f'{np.abs(deviations).max():.1f}'],
        ['errors with a closed form', len(closed)],
        ['largest relative difference between the two', f'{max(closed):.0e}'],
    ]
    return markdown(rows, ['', ''])


def case_of(problem: Problem) -> tuple[str, str]:
    """What tells a problem from the others of its table."""
    return problem.measure if problem.curvature is None else f'aT = {problem.curvature * STEPS:g}', f'{problem.noise:g}'


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A Markdown table of texts."""
    return tabulate(rows, headers, tablefmt='github', disable_numparse=True, stralign='right')


def panels(results: Mapping[Problem, Sequence[Record]]) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """The curves of the picture: lines are exact, with markers for the simulation and dots for the closed forms."""
    drawn = {}
    for problem, records in results.items():
        if problem.curvature is None:
            continue
        curves: dict[str, list[tuple[float, float]]] = {name: [] for name in STYLES}
        for name in LINES:
            points = [record for record in records if record['average'] == name]
            curves[name] = [(record['step'], record['exact']) for record in points]
            curves[SIMULATION] += [(record['step'], record['simulated']) for record in points[::-MARKED]]
            closed = [(record['step'], record['closed_form']) for record in points if record['closed_form'] is not None]
            # What is not a number keeps one line from the next.
            curves[CLOSED_FORM] += [*closed, (math.nan, math.nan)]
        a_t = f'{problem.curvature * STEPS:g}'
        drawn[f'noise {problem.noise:g}', f'a = {problem.curvature:g} (aT = {a_t})'] = curves
    return drawn


def write_curves(results: Mapping[Problem, Sequence[Record]], path: Path) -> None:
    """Write all records as CSV."""
    records = list(itertools.chain.from_iterable(results.values()))
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(records)


@click.command(context_settings={'help_option_names': ['-h', '--help']})
@click.option(
    '--paths', default=4000, show_default=True, type=click.IntRange(min=2), help='Simulated of each quadratic.'
)
@click.option('--seed', default=0, show_default=True, help='Of the simulation.')
@click.option('--out', default=OUT, show_default=True, type=click.Path(file_okay=False, path_type=Path))
def main(paths: int, seed: int, out: Path) -> None:
    """Compute and simulate the mean squared error of each average, and write tables and a picture."""
    generator = np.random.default_rng(seed)
    results = {problem: study(problem, paths, generator) for problem in problems()}
    out.mkdir(parents=True, exist_ok=True)
    write_curves(results, out / 'curves.csv')
    (out / 'tables.md').write_text(tables(results), encoding='utf-8')
    plot_log_panels(panels(results), out / 'theory.png', 't (steps)', 'mean squared error', STYLES)
    click.echo(tables(results))
    click.echo(f'All of it: {out}')


if __name__ == '__main__':
    main()
