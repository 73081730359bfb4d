# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Many settings at once: grids, averages in memory, and how often the checkpoints are read for them."""

import collections
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from composer_bema.formats.tensors import LazyTensor
from composer_bema.offline.plan import Average
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize, write_averages
from composer_bema.offline.sweep import Result, best_results, evaluate_averages, expand_grid, folder_name
from composer_bema.offline.trajectory import Trajectory

SHAPES = {'weight': (5, 7), 'norm.running_mean': (5,), 'scalar': ()}


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    for step in range(10, 70, 10):
        tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        save_file({**tensors, 'count': torch.tensor([step])}, folder / f'model-{step}.safetensors')
    return folder


def test_a_grid_is_every_combination_of_its_lists():
    """The last axis runs fastest, and what is no list is the same in all."""
    grid = {'rule': ['bema', 'dema'], 'update_freq': 400, 'update_after': [0, 800], 'ema_power': [0.2, 0.5], 'lag': 5}
    assert expand_grid(grid) == [
        Setting(rule, {'ema_power': power, 'lag': 5}, 400, after)
        for rule in ('bema', 'dema')
        for after in (0, 800)
        for power in (0.2, 0.5)
    ]
    assert expand_grid({'rule': 'ema', 'ema_power': [None]}) == [Setting('ema', {'ema_power': None})]


@pytest.mark.parametrize(
    ('grid', 'error', 'message'),
    [
        ({'window': 2}, ValueError, r"A grid needs a 'rule': \{'window': 2\} has none"),
        ({'rule': 'lawa', 'window': []}, ValueError, "The list of values of 'window' is empty"),
        ({'rule': ['lawa', 'ema'], 'window': 2}, ValueError, "The rule 'ema' has no setting 'window'"),
        ({'rule': 'lawa'}, ValueError, "The rule 'lawa' needs the setting 'window'"),
        ({'rule': 'law', 'window': 2}, ValueError, "There is no rule 'law', but bema, "),
        ({'rule': 'ema', 'update_freq': [2, 0.5]}, TypeError, 'update_freq'),
    ],
)
def test_wrong_grids(grid, error, message):
    with pytest.raises(error, match=message):
        expand_grid(grid)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_averages_in_memory_are_those_that_are_written(tmp_path, checkpoints, dtype):
    trajectory = Trajectory(checkpoints)
    settings = expand_grid({'rule': 'bema', 'update_after': 10, 'bias_power': [0.2, 0.6]})
    settings += expand_grid({'rule': 'lawa', 'window': [1, 3]})
    averages = [average for setting in settings for average in trajectory.plan(setting, [40, 60])]
    seen = []

    def evaluate(weights):
        seen.append({name: tensor.clone() for name, tensor in weights.items()})
        return {'one': float(len(seen)), 'two': 0.5}

    results = evaluate_averages(trajectory, averages, evaluate, dtype=dtype)
    assert [result.average for result in results] == averages
    assert [result.losses for result in results] == [{'one': n, 'two': 0.5} for n in range(1, 9)]
    names = {folder_name(average): average for average in averages}
    assert list(names)[0] == 'bema,bias_power=0.2,update_after=10/step40'
    name = None if dtype is None else str(dtype).removeprefix('torch.')
    for weights, folder in zip(seen, write_averages(trajectory, names, tmp_path / 'all', dtype=name), strict=True):
        written = load_file(folder / 'model.safetensors')
        assert {n: tensor.dtype for n, tensor in written.items()} == {
            n: torch.int64 if n == 'count' else dtype or torch.float32 for n in written
        }
        assert set(written) == set(weights)
        assert all(torch.equal(written[n], weights[n]) for n in written)
    # One alone is computed in another way, and so comes out as another rounding of the same.
    (folder,) = stabilize(checkpoints, tmp_path / 'one', settings[0], dtype=name)
    for n, tensor in load_file(folder / 'model.safetensors').items():
        torch.testing.assert_close(tensor, seen[1][n], rtol=2**-7 if dtype else 1e-5, atol=1e-6)


@pytest.mark.parametrize('number', [1, 2, 9])
def test_every_tensor_is_read_once_whatever_the_number_of_settings(checkpoints, number):
    trajectory = Trajectory(checkpoints)
    settings = expand_grid({'rule': 'bema', 'update_after': 10, 'bias_power': [0.1 * n for n in range(number)]})
    averages = [average for setting in settings for average in trajectory.plan(setting, [30, 60])]
    reads = collections.Counter()
    pieces = LazyTensor.pieces

    def count(tensor, *args):
        reads[id(tensor)] += 1
        return pieces(tensor, *args)

    with (
        mock.patch.object(LazyTensor, 'pieces', count),
        mock.patch(
            'composer_bema.formats.pretrained._read_tensor', side_effect=AssertionError('it is read as a whole')
        ),
    ):
        evaluate_averages(trajectory, averages, lambda weights: {})
    # Six checkpoints of four tensors, all of which weigh in the averages at the last step.
    assert list(reads.values()) == [1] * 24


def test_the_best_are_found_by_evaluator_and_rule():
    def result(rule, step, **losses):
        return Result(Average(Setting(rule), step, np.ones(1), np.ones(1)), losses)

    first, second, third = result('ema', 1, a=2.0, b=1.0), result('ema', 2, a=1.5, b=3.0), result('bema', 1, a=9.0, b=9)
    assert best_results([first, second, third]) == {
        ('a', 'ema'): second,
        ('b', 'ema'): first,
        ('a', 'bema'): third,
        ('b', 'bema'): third,
    }
    assert best_results([]) == {}
    # What has diverged is never the best.
    diverged = result('ema', 3, a=float('nan'), b=float('inf'))
    assert best_results([diverged, first]) == {('a', 'ema'): first, ('b', 'ema'): first}
