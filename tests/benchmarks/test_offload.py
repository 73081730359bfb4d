# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The measurement of averages in host memory, on a model so small that the numbers mean nothing; and without a GPU."""

import subprocess
import sys

import pytest
import torch

from benchmarks import offload
from tests.benchmarks.studies import ROOT


def test_the_model_has_a_billion_parameters():
    with torch.device('meta'):
        model = offload.Transformer()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == 1.01


def test_each_average_is_updated_once_in_ten_steps():
    training = offload.Training(offload.Transformer(2, 32, 64, 50), 50, batch=2, length=8)
    result = offload.measure(training, repeats=2, windows=1)
    # Twice, in the window that is measured and in the one before it.
    assert {name: a and a.num_updates for name, a in training.averages.items()} == {
        'none': None,
        'on the device': 4,
        'in host memory': 4,
    }
    assert result['average none / none'] == 1
    seconds = [result[f'a step, average {name}, s'] for name in ('in host memory', 'none')]
    assert result['average in host memory / none'] == pytest.approx(seconds[0] / seconds[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so_in_a_sentence():
    script = str(ROOT / 'benchmarks' / 'offload.py')
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stdout) == (1, '')
    assert result.stderr == 'There is no GPU here, and this is about models on one: nothing was measured.\n'
