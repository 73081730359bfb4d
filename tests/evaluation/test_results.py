# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tables, JSON and pictures of measurements."""

import json
import math

from composer_bema.evaluation.harness import Generation
from composer_bema.evaluation.measurements import Measurement
from composer_bema.evaluation.results import Result, table_of, write_generations, write_results
from composer_bema.evaluation.targets import Subject

BEMA = Subject('bema', 20, {'rule': 'bema', 'bias_power': 0.4})
RESULTS = [
    Result(Subject('training', 10, {'rule': 'lawa'}), [Measurement('boolq', 'accuracy', 0.5, 0.125, 16)]),
    Result(
        BEMA,
        [
            Measurement('loss-held_out', 'loss', 1.25, None, 1),
            Measurement('loss-held_out', 'perplexity', math.inf, math.nan, 1),
            Measurement('boolq', 'accuracy', 0.75, 0.1, 16),
            Measurement('boolq_part', 'accuracy', 1.0, 0.0, 2),
        ],
    ),
]
TASKS = ['boolq', 'loss-held_out']


def test_table():
    lines = table_of(RESULTS, TASKS).splitlines()
    assert [column for column in lines[0].split('  ') if column] == [
        'weights',
        'step',
        'boolq accuracy',
        'held_out loss',
        'held_out perplexity',
    ]
    assert lines[2].split() == ['training', '10', '0.5000', '±', '0.1250']
    assert lines[3].split() == ['bema', '20', '0.7500', '±', '0.1000', '1.2500', 'inf', '±', 'nan']


def test_files(tmp_path):
    write_results(RESULTS, TASKS, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert lines[0] == {
        'weights': 'training',
        'rule': 'lawa',
        'step': 10,
        'task': 'boolq',
        'metric': 'accuracy',
        'value': 0.5,
        'standard_error': 0.125,
        'count': 16,
    }
    # What is no number in JSON is null, and a set within a task is there too.
    assert (lines[2]['value'], lines[2]['standard_error']) == (None, None)
    assert lines[4]['task'] == 'boolq_part'
    assert (tmp_path / 'table.md').read_text().startswith('| weights')
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['boolq-accuracy.png', 'loss-held_out-loss.png']


def test_models_without_steps_have_no_picture(tmp_path):
    write_results([Result(Subject('folder'), [Measurement('boolq', 'accuracy', 0.5, 0.1, 4)])], ['boolq'], tmp_path)
    assert not list(tmp_path.glob('*.png'))


def test_generations(tmp_path):
    generation = Generation('boolq', 3, 'Is it?', 'Answer: yes', ['ja', 'yes \u2713'], 0.5)
    write_generations(BEMA, [generation], tmp_path)
    write_generations(BEMA, [generation], tmp_path)
    lines = (tmp_path / 'generations.jsonl').read_text(encoding='utf-8').splitlines()
    assert [json.loads(line) for line in lines] == [{'weights': 'bema', 'step': 20, **generation._asdict()}] * 2
