# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The run's folder: metrics line by line, curves, and the closing report."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from composer.core import Timestamp

from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.outputs import (
    MetricsFile,
    by_dotted_keys,
    check_run_folder,
    evaluation_curves,
    perplexity,
    read_metrics,
    report,
    write_settings,
)
from tests.training.tiny import tiny_settings, write_yaml


@contextlib.contextmanager
def logger_at(path, batch):
    logger, state = MetricsFile(path), SimpleNamespace(timestamp=Timestamp(epoch=1, batch=batch, token=10 * batch))
    logger.init(state, None)
    yield logger
    logger.close(state, None)


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    with logger_at(path, batch=3) as logger:
        logger.log_metrics({'loss': torch.tensor(0.5), 'flag': True})
        logger.log_metrics({})
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {'batch': 3, 'epoch': 1, 'token': 30, 'loss': 0.5, 'flag': True},
        ]


def test_values_that_json_lacks_come_back(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    with logger_at(path, batch=1) as logger:
        logger.log_metrics({'a': math.nan, 'b': torch.tensor(-math.inf)})

    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert math.isnan(float(record['a']))
    assert float(record['b']) == -math.inf


@pytest.mark.parametrize(('batch', 'lines'), [(0, 1), (5, 2)])
def test_a_resumed_run_appends_and_a_new_one_starts_afresh(tmp_path, batch, lines):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"batch": 9}\n{"ba')
    with logger_at(path, batch) as logger:
        logger.log_metrics({'loss': 1.0})
    assert len(read_metrics(path)) == lines


def test_the_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"batch": 1}\n{"bat')
    assert read_metrics(path) == [{'batch': 1}]


@pytest.mark.parametrize('line', ['{"ba', '7', '[]', '{}', '{"batch": "1"}', '\xff'])
def test_a_damaged_line_before_the_last_is_named(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"batch": 1}\n' + line.encode('latin-1') + b'\n{"batch": 2}\n')
    with pytest.raises(ValueError, match=f"^Line 2 of '{path}' is damaged: it is no JSON object with the number of"):
        read_metrics(path)


def test_the_perplexity_of_any_loss():
    assert [perplexity(0.0), perplexity(1e9)] == [1.0, math.inf]
    assert math.isnan(perplexity(math.nan))


def test_curves_are_the_evaluators_and_later_lines_win():
    records = [
        {'batch': 2, 'metrics/ema/LanguageCrossEntropy': 3.0, 'metrics/ema/LanguagePerplexity': 20.0},
        {'batch': 2, 'metrics/train/LanguageCrossEntropy': 9.0, 'loss/train/total': 9.0},
        {'batch': 1, 'metrics/ema/LanguageCrossEntropy': 4.0},
        {'batch': 2, 'metrics/ema/LanguageCrossEntropy': 2.0},
        {'batch': 2, 'metrics/a/b/LanguageCrossEntropy': 'inf'},
    ]
    assert evaluation_curves(records) == {'ema': [(1, 4.0), (2, 2.0)], 'a/b': [(2, math.inf)]}


def test_report(tmp_path):
    losses = {f'metrics/{label}/LanguageCrossEntropy': 0.0 for label in ('ema', 'held_out')}
    (tmp_path / 'metrics.jsonl').write_text(json.dumps({'batch': 7, **losses}) + '\n')
    table, files = report(tmp_path, {'ema': 'EMA'}).split('\n\n')
    assert [line.split() for line in table.splitlines()[-2:]] == [
        ['ema', 'EMA', '7', '0.0000', '1.000'],
        ['held_out', 'training', '7', '0.0000', '1.000'],
    ]
    for name in ('config.yaml', 'metrics.jsonl', 'curves.png'):
        assert str(tmp_path / name) in files
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_a_folder_of_another_run_is_refused(tmp_path):
    settings = tiny_settings(tmp_path)
    path = write_yaml(tmp_path, settings)
    folder = check_run_folder(load_config(path))
    assert not folder.exists()
    write_settings(load_config(path), folder)
    assert load_config(folder / 'config.yaml') == load_config(path)
    check_run_folder(load_config(path))  # it holds settings, but no run yet
    (folder / 'metrics.jsonl').touch()
    with pytest.raises(ConfigError, match='holds a run already; give another run_name, or set save_overwrite=true'):
        check_run_folder(load_config(path))
    with pytest.raises(ConfigError, match='holds a run already'):
        check_run_folder(load_config(path, ['load_path=x.pt', 'load_weights_only=true']))
    # Of a checkpoint in another run's folder this one would be a branch.
    other = tmp_path / 'other'
    write_settings(load_config(path), other)
    with pytest.raises(ConfigError, match='holds a run already'):
        check_run_folder(load_config(path, [f'load_path={other}/checkpoints/x.pt']))
    own = ['load_path=x.pt', f'load_path={folder}/checkpoints/x.pt']
    for goes_on in ('save_overwrite=true', 'autoresume=true', *own):
        check_run_folder(load_config(path, [goes_on]))


def test_settings_by_dotted_keys():
    settings = {'a': 1, 'b': {'c': {'d': [{'e': 2}]}, 'f': None}, 'g': {}}
    assert by_dotted_keys(settings) == {'a': 1, 'b.c.d': [{'e': 2}], 'b.f': None, 'g': {}}
