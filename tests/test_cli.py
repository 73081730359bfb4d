# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The command line: what it prints, and the one sentence that a mistake gets."""

import json

import pytest
from click.testing import CliRunner

from composer_bema.cli import main
from tests.training.tiny import tiny_settings, write_yaml


@pytest.fixture
def yaml(tmp_path):
    return write_yaml(tmp_path, tiny_settings(tmp_path))


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_train(tmp_path, yaml):
    result = run('train', yaml, 'max_duration=2ba')
    assert result.exit_code == 0, result.output
    assert 'evaluator' in result.stdout
    assert f'metrics: {tmp_path}/run/metrics.jsonl' in result.stdout


def test_dry_run_leaves_nothing(tmp_path, yaml):
    result = run('train', yaml, '--dry-run')
    assert (result.exit_code, result.stdout) == (0, f"'{yaml}' is fine.\n")
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['max_durations=1ep'], "max_durations is not a setting; the nearest one is 'max_duration'."),
        (['optimizer.lrr=1'], "optimizer.lrr is not a setting; the nearest one is 'optimizer.lr'."),
        (['--dry-run', 'optimizer.lrr=1'], "optimizer.lrr is not a setting; the nearest one is 'optimizer.lr'."),
        (['train_loader.dataset.part=x'], "train_loader.dataset.part must be one of train, held_out, all, not 'x'."),
        (['load_path=/no/where.pt'], '/no/where.pt'),
    ],
)
def test_a_mistake_gets_one_sentence(yaml, arguments, sentence):
    result = run('train', yaml, *arguments)
    assert result.exit_code == 2
    assert result.stderr.count('\n') == 1
    assert result.stderr.startswith('Error: ')
    assert sentence in result.stderr
    assert 'Traceback' not in result.output


def test_traceback_on_demand(yaml):
    result = run('--traceback', 'train', yaml, 'max_durations=1ep')
    assert isinstance(result.exception, ValueError)


def test_missing_file():
    result = run('train', 'nothing.yaml')
    assert (result.exit_code, result.stderr) == (2, "Error: No such settings file: 'nothing.yaml'.\n")


def test_convert_and_train_on_it(tmp_path, yaml):
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps({'text': 'word ' * 8}) + '\n' for _ in range(32)))
    out = tmp_path / 'mds'
    result = run(
        'convert', f'{tmp_path}/*.jsonl', '--out-root', str(out), '--tokenizer', 'bytes', '--concat-tokens', '32'
    )
    # 32 rows of 40 letters and an end token.
    assert (result.exit_code, result.stdout) == (0, f"Wrote 41 samples to '{out}'.\n")
    loader = f'train_loader={{name: text, dataset: {{local: {out}, shuffle: true}}, drop_last: true}}'
    result = run('train', yaml, loader, 'max_duration=2ba')
    assert result.exit_code == 0, result.output


def test_convert_says_what_is_wrong(tmp_path):
    result = run('convert', 'nothing-*.txt', '--out-root', str(tmp_path / 'mds'))
    assert (result.exit_code, result.stderr) == (2, "Error: No file matches 'nothing-*.txt'.\n")
