# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the measurements of cost make of what they measured, on times made up for the purpose; and what the peers do."""

import json
import os
import sys

import numpy as np
import pytest
import torch

from tests.benchmarks.studies import ROOT, run_study

# The scripts find each other in their own folder.
sys.path.append(str(ROOT / 'benchmarks'))

from benchmarks import memory, startup, training, update
from benchmarks.measuring import Weights, gpt2_shapes, in_fresh_process, markdown, median_ratio, quartiles
from benchmarks.paste_tables import paste
from benchmarks.peers import ALPHA, BETA, OURS, OURS_BY_TORCH_ALONE, Method, others


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table below its head."""
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()[2:]]


def test_a_ratio_is_the_median_of_pairs():
    """The median of 1, 4 and 2, and not that of 2, 4 and 6 by that of 1, 2 and 3."""
    assert median_ratio([2, 4, 6], [2, 1, 3]) == 2
    assert quartiles([1, 2, 3, 4, 5]) == (2, 4)
    assert quartiles([7]) == (7, 7)


def test_tables_leave_out_what_a_row_lacks():
    assert cells(markdown([{'': 'a', 'x': 0.125, 'y': 'z'}, {'': 'b'}], digits=1)) == [['a', '0.1', 'z'], ['b', '', '']]


def test_the_shapes_are_those_of_gpt2_small():
    assert sum(shape.numel() for shape in gpt2_shapes()) == 124_439_808


def test_a_process_of_its_own_gets_its_environment():
    assert in_fresh_process(os.getenv, 'BENCHMARK', environment={'BENCHMARK': 'x'}) == 'x'
    assert 'BENCHMARK' not in os.environ


@pytest.mark.parametrize(
    ('action', 'kind', 'weight', 'expected'),
    [
        # fp32: three streams, five, and four.
        ('update', 'ema', 4, 12),
        ('update', 'bema', 4, 20),
        ('swap in', 'bema', 4, 16),
        ('swap out', 'bema', 4, 16),
        # bf16: theta and theta_0 have 2 bytes. A copy of theta is read and written, the average read, theta written.
        ('update', 'ema', 2, 10),
        ('update', 'bema', 2, 16),
        ('swap in', 'bema', 2, 10),
        ('swap out', 'bema', 2, 4),
    ],
)
def test_the_unit_counts_what_has_to_be_read_and_written(action, kind, weight, expected):
    assert update.streamed_bytes(action, kind, weight) == expected


def test_times_are_in_units_and_in_ours():
    """Ours takes 12 s where copying takes 10, and the other one's 60."""
    triad = {'method': 'triad', 'action': 'triad', 'seconds a byte': [1e-9]}

    def row(method: str, seconds: float) -> dict:
        taken = {'bytes': 10, 'seconds': [seconds] * 3, 'seconds a byte': [1.0] * 3}
        return {'method': method, 'kind': 'bema', 'action': 'update', **taken}

    table = update.table({'alone': [triad, row('BEMA', 12.0), row('slow', 60.0)]})
    assert cells(table)[:2] == [['BEMA', '1.20', '', '12000.00'], ['slow', '6.00', '5.00', '60000.00']]


def test_speeds_are_compared_round_by_round():
    table = training.table({'speeds': {'none': [100.0, 50.0, 80.0], 'slower': [90.0, 40.0, 76.0]}})
    assert cells(table) == [
        ['none', '80', '1.000', '1.000 to 1.000'],
        ['slower', '76', '0.900', '0.850 to 0.925'],
    ]


def test_the_memory_of_a_method_has_a_column_for_each_of_the_weights():
    results = {
        'EMA': {'fp32': {'kept': 4.0, 'update': 0.0, 'swap': 0.1}},
        'other': {'fp32': {'kept': 8.0, 'update': 4.0}},
    }
    assert cells(memory.table(results)) == [['EMA', '4.0', '0.0', '0.1'], ['other', '8.0', '4.0', '']]


def test_weights_that_were_loaded_from_bf16_are_fp32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, 'make_weights', lambda model, dtype: Weights([torch.Size((50,))], torch.float32))
    (loaded,) = memory.make_model('fp32 from bf16').parameters()
    (random,) = memory.make_model('fp32').parameters()
    assert loaded.dtype == random.dtype == torch.float32
    assert torch.equal(loaded, loaded.bfloat16()) and not torch.equal(random, random.bfloat16())


def test_startup_is_told_beside_the_bare_interpreter():
    table = startup.table(
        {
            'python -c pass': {'seconds': [0.1, 0.2, 0.9], 'torch': False},
            'import torch': {'seconds': [2.0], 'torch': True},
        }
    )
    assert cells(table) == [['`python -c pass`', '0.200', '0.000', 'no'], ['`import torch`', '2.000', '1.800', 'yes']]


def test_tables_are_pasted_between_their_marks(tmp_path):
    (tmp_path / 'a.md').write_text('new \\1\n\n')
    page = 'x\n<!-- table a -->\nold\n<!-- end -->\n<!-- table b -->\nkept\n<!-- end -->\n'
    text, pasted = paste(page, tmp_path)
    assert text == 'x\n<!-- table a -->\nnew \\1\n<!-- end -->\n<!-- table b -->\nkept\n<!-- end -->\n'
    assert pasted == ['a']
    assert paste(text, tmp_path) == (text, ['a'])


@pytest.mark.parametrize('method', [*OURS, *OURS_BY_TORCH_ALONE, *others()], ids=lambda method: method.name)
def test_all_methods_compute_what_they_are_compared_as(method: Method):
    """Two updates with weights that went from 0 to 1: an EMA of 1 - (1 - beta)^2, and for BEMA alpha more."""
    model = Weights([torch.Size((3,)), torch.Size((2, 2))], torch.float32)
    fill(model, 0)
    kept = method.keep(model)
    fill(model, 1)
    kept.update()
    kept.update()
    expected = 1 - (1 - BETA) ** 2 + (ALPHA if method.kind == 'bema' else 0)
    for tensor in kept.average():
        np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=1e-5)
    if kept.swap_in is not None and kept.swap_out is not None:
        kept.swap_in()
        for parameter in model.parameters():
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5)
        kept.swap_out()
    assert all((parameter == 1).all() for parameter in model.parameters())


@torch.no_grad()
def fill(model: torch.nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


@pytest.mark.slow
def test_updates_are_measured_and_written_down(tmp_path):
    arguments = ('--model', 'adapters', '--dtype', 'bf16', '--condition', 'as users run it', '--repeats', '1')
    output = run_study('update.py', *arguments, cwd=tmp_path)
    assert (tmp_path / 'runs/benchmarks/update-adapters-bf16.md').read_text() in output
    result = json.loads((tmp_path / 'runs/benchmarks/update-adapters-bf16.json').read_text())
    rows = result['rows']['as users run it']
    assert {row['action'] for row in rows} == {'triad', 'update', 'swap in', 'swap out'}
    assert all(len(row['seconds']) == 1 for row in rows if row['action'] != 'triad')


def test_startup_is_measured_and_written_down(tmp_path):
    output = run_study('startup.py', '--repeats', '1', cwd=tmp_path)
    assert (tmp_path / 'runs/benchmarks/startup.md').read_text() in output
    result = json.loads((tmp_path / 'runs/benchmarks/startup.json').read_text())
    assert [row['torch'] for row in result['rows'].values()] == [False, False, False, False, False, True]
