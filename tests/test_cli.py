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


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    settings = tiny_settings(folder) | {'algorithms': {'bema': {'update_freq': '1ba'}}, 'eval_loader': None}
    result = run('train', write_yaml(folder, settings), 'max_duration=2ba', f'save_folder={folder}/checkpoints')
    assert result.exit_code == 0, result.output
    return f'{folder}/checkpoints/latest-rank0.pt'


def test_export(tmp_path, checkpoint):
    results = {
        weights: run('export', checkpoint, '--weights', weights, '--out', str(tmp_path / weights))
        for weights in ('average', 'training', 'theta_0')
    }
    for weights, result in results.items():
        written = f"Wrote the {weights} weights of '{checkpoint}' to '{tmp_path / weights}'.\n"
        assert (result.exit_code, result.stdout) == (0, written), result.output
    files = {weights: (tmp_path / weights / 'model.safetensors').read_bytes() for weights in results}
    assert len(set(files.values())) == 3


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (
            ['--weights', 'emma'],
            "has no 'emma' weights: it has the average of BEMA, its buffers bema, ema, theta_0, and",
        ),
        (['--average', 'DEMA'], "holds no average 'DEMA', but BEMA."),
        (['--out', '/'], "'/' exists and is not an empty folder: name another one, or remove it."),
    ],
)
def test_export_says_what_is_wrong(tmp_path, checkpoint, arguments, sentence):
    result = run('export', checkpoint, '--out', str(tmp_path / 'out'), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith('Error: ')
    assert result.stderr.count('\n') == 1
    assert sentence in result.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content', [None, b'text'])
def test_export_of_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / 'x.pt'
    if content is not None:
        path.write_bytes(content)
    result = run('export', str(path), '--out', str(tmp_path / 'out'))
    assert result.exit_code == 2
    assert result.stderr.count('\n') == 1
    assert f"'{path}'" in result.stderr
