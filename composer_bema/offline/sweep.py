# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Many settings over one directory of checkpoints, in one reading: written as models, or evaluated in memory."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch

from composer_bema.offline.outputs import MemoryWriter
from composer_bema.offline.plan import Average
from composer_bema.offline.settings import Setting
from composer_bema.offline.trajectory import Trajectory

__all__ = ['Evaluate', 'Result', 'averaged_weights', 'best_results', 'evaluate_averages', 'expand_grid', 'folder_name']

log = logging.getLogger(__name__)

# Returns losses by the names of evaluators, for weights by the names that they have in the checkpoints.
Evaluate = Callable[[Mapping[str, torch.Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class Result:
    """What the evaluation of one average has shown: losses by the names of evaluators."""

    average: Average
    losses: Mapping[str, float]


def expand_grid(grid: Mapping[str, Any]) -> list[Setting]:
    """Returns the settings of a grid: every combination of the values of those that are lists.

    Args:
        grid (Mapping[str, Any]): ``rule``, and any of its settings, ``update_freq`` and ``update_after``.

    Raises:
        TypeError: If a number of steps is no whole number.
        ValueError: If there is no such rule, or it has no such setting, or needs another.

    Example:
        >>> [str(setting) for setting in expand_grid({'rule': 'lawa', 'window': [2, 4]})]
        ['lawa window=2', 'lawa window=4']
    """
    axes = {name: values if isinstance(values, list) else [values] for name, values in grid.items()}
    if 'rule' not in axes:
        raise ValueError(f"A grid needs a 'rule': {dict(grid)} has none.")
    for name, values in axes.items():
        if not values:
            raise ValueError(f"The list of values of '{name}' is empty.")
    settings = []
    for values in itertools.product(*axes.values()):
        options = dict(zip(axes, values, strict=True))
        rule = options.pop('rule')
        update_freq, update_after = options.pop('update_freq', None), options.pop('update_after', 0)
        settings.append(Setting(rule, options, update_freq, update_after))
    return settings


def folder_name(average: Average) -> str:
    """Returns the name of a folder for an average among others."""
    return f'{str(average.setting).replace(" ", ",")}/step{average.step}'


def evaluate_averages(
    trajectory: Trajectory,
    averages: Sequence[Average],
    evaluate: Evaluate,
    *,
    dtype: Optional[torch.dtype] = None,
    show_progress: bool = False,
) -> list[Result]:
    """Computes averages in one reading, all of them in memory, and evaluates each.

    Args:
        trajectory (Trajectory): The checkpoints.
        averages (Sequence[Average]): The averages.
        evaluate (Evaluate): Returns losses of weights.
        dtype (torch.dtype, optional): What averaged tensors are kept in. Default: the checkpoints'.
        show_progress (bool): Whether to draw a bar. Default: ``False``.

    Raises:
        ValueError: If a checkpoint is damaged, or they do not fit together.
    """
    results = []
    for average, weights in averaged_weights(trajectory, averages, dtype=dtype, show_progress=show_progress):
        losses = evaluate(weights)
        described = ', '.join(f'{label} {loss:.4f}' for label, loss in losses.items())
        log.info('%s at step %d: %s', average.setting, average.step, described)
        results.append(Result(average, losses))
    return results


def averaged_weights(
    trajectory: Trajectory,
    averages: Sequence[Average],
    *,
    dtype: Optional[torch.dtype] = None,
    show_progress: bool = False,
) -> Iterator[tuple[Average, Mapping[str, torch.Tensor]]]:
    """Computes averages in one reading, all of them in memory, and yields each with its weights, which it then forgets.

    The arguments and errors are those of :func:`evaluate_averages`.
    """
    reading = trajectory.open(averages)
    threads = torch.get_num_threads()
    specs = [reading.specs(average, dtype) for average in averages]
    nbytes = sum(spec.nbytes for tensors in specs for spec in tensors.values())
    log.info(
        'Reading %.1f GB of %d checkpoints for %d averages, all held in memory: %.1f GB, and %d MiB for reading.',
        reading.nbytes / 1e9,
        len(reading.sources),
        len(averages),
        nbytes / 1e9,
        reading.scratch_bytes(threads) / 2**20,
    )
    memories = [MemoryWriter(tensors) for tensors in specs]
    reading.compute(memories, threads, show_progress)
    for average in averages:
        yield average, memories.pop(0).weights


def best_results(results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """Returns the result with the lowest loss, by the evaluator and the rule; a loss that is no number is none."""
    best: dict[tuple[str, str], Result] = {}
    for result in results:
        for label, loss in result.losses.items():
            key = label, result.average.setting.rule
            if not math.isfinite(loss):
                continue
            if key not in best or loss < best[key].losses[label]:
                best[key] = result
    return best
