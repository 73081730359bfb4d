# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluations from the command line to their folder of results, on runs and questions of the project's own."""

import json
import signal
import tempfile
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from composer_bema.cli import main
from composer_bema.evaluation.evaluate import evaluate as run_evaluation
from composer_bema.evaluation.suite import Suite
from composer_bema.evaluation.tasks import Protocol
from composer_bema.training.config import load_config
from composer_bema.training.run import train
from tests.evaluation.models import FILES, make_model, make_tokenizer
from tests.training.tiny import tiny_settings, write_yaml


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run of six steps with BEMA, saved at each of them."""
    folder = tmp_path_factory.mktemp('run')
    settings = tiny_settings(folder)
    settings['algorithms'] = {'bema': {'update_interval': '1ba', 'eval_labels': ['two'], 'save_weights': 'training'}}
    settings |= {'save_folder': f'{folder}/run/checkpoints', 'save_interval': '1ba', 'eval_interval': '1ba'}
    train(load_config(write_yaml(folder, settings)))
    # Other tests of this process make groups of their own.
    torch.distributed.destroy_process_group()
    return folder / 'run'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def evaluate(*arguments):
    return CliRunner().invoke(main, ['evaluate', *map(str, arguments)])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged_losses(run, label):
    metrics = [line for line in lines(run / 'metrics.jsonl') if f'metrics/{label}/LanguageCrossEntropy' in line]
    return {line['batch']: line[f'metrics/{label}/LanguageCrossEntropy'] for line in metrics}


def test_losses_of_a_run_are_those_that_it_has_logged(run, tmp_path):
    out = tmp_path / 'out'
    result = evaluate(
        run / 'checkpoints', '--tasks', 'loss', '--rule', 'training', '--update-freq', 1, '--every-update', '--out', out
    )
    assert result.exit_code == 0, result.output
    found = {
        line['step']: line['value']
        for line in lines(out / 'results.jsonl')
        if (line['task'], line['metric']) == ('loss-held_out', 'loss')
    }
    logged = logged_losses(run, 'one')
    # Step 1 is the first checkpoint, from which the updates start.
    assert found == pytest.approx({step: loss for step, loss in logged.items() if step in found}, rel=1e-5)
    assert len(found) >= 5
    assert {path.name for path in out.iterdir()} >= {'table.md', 'protocol.json', 'loss-train-loss.png'}


def test_the_average_of_a_checkpoint(run, tmp_path):
    checkpoint = next((run / 'checkpoints').glob('ep*-ba6-rank0.pt'))
    result = evaluate(checkpoint, '--tasks', 'loss', '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    [loss] = [
        line['value']
        for line in lines(tmp_path / 'out/results.jsonl')
        if (line['task'], line['metric']) == ('loss-held_out', 'loss')
    ]
    assert loss == pytest.approx(logged_losses(run, 'two')[6], rel=1e-5)


def test_questions_and_their_generations(model, tmp_path):
    data = [f'--data={task}={file}' for task, file in FILES.items()]
    out = tmp_path / 'out'
    result = evaluate(
        model, '--tasks', 'boolq,gsm8k', *data[:2], '--samples', 2, '--questions', 2, '--save-generations', '--out', out
    )
    assert result.exit_code == 0, result.output
    assert 'boolq accuracy' in result.output
    generations = lines(out / 'generations.jsonl')
    assert [(g['task'], len(g['answers'])) for g in generations] == [('boolq', 2)] * 2 + [('gsm8k', 2)] * 2
    protocol = json.loads((out / 'protocol.json').read_text())
    assert (protocol['mode'], protocol['samples'], protocol['seed']) == ('sample', 2, 37371)
    assert protocol['versions']['lm_eval']
    assert (protocol['target'], protocol['dtype'], protocol['device']) == (model, 'float32', 'cpu')
    assert protocol['chat'] is False


def test_files_of_text(model, tmp_path):
    text = tmp_path / 'text.jsonl'
    text.write_text(json.dumps({'text': 'What is written here is read again and again. ' * 10}) + '\n')
    options = ['--tasks', 'loss', f'--text=a={text}', f'--text=b={text}', '--max-seq-len', 32]
    result = evaluate(model, *options, '--batches', 1, '--batch-size', 3, '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    found = {(line['task'], line['metric']): line for line in lines(tmp_path / 'out/results.jsonl')}
    assert found['loss-a', 'loss']['value'] == found['loss-b', 'loss']['value']
    assert found['loss-a', 'loss']['count'] == 3
    protocol = json.loads((tmp_path / 'out/protocol.json').read_text())
    assert protocol['texts'] == {
        'files': {'a': [str(text)], 'b': [str(text)]},
        'max_seq_len': 32,
        'batch_size': 3,
        'batches': 1,
    }
    assert 'samples' not in protocol


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--tasks', 'arc'], "There is no task 'arc', but loss, boolq, gsm8k, mmlu_hs."),
        (['--tasks', ','], 'Name a task: loss, boolq, gsm8k, mmlu_hs.'),
        (['--tasks', 'boolq,boolq'], "The task 'boolq' is there twice."),
        (['--tasks', 'loss'], 'add --text NAME=FILE'),
        (['--tasks', 'boolq', '--text', 'a=b'], "--text belongs to the task 'loss', which is not among --tasks."),
        (['--tasks', 'boolq', '--batches', '2'], "--batches belongs to the task 'loss'"),
        (['--tasks', 'loss', '--run', 'x', '--max-seq-len', '8'], '--max-seq-len belongs to --text'),
        (['--tasks', 'loss', '--text', 'a=b', '--seed', '0'], '--seed belongs to questions, and none of --tasks asks'),
        (['--tasks', 'loss', '--text', 'a=b', '--no-chat-template'], '--chat-template belongs to questions'),
        (
            ['--tasks', 'boolq', '--mode', 'greedy', '--samples', '50'],
            '--samples belongs to --mode sample: with greedy',
        ),
        (['--tasks', 'boolq', '--seed', str(2**32)], 'is not in the range 0<=x<=4294967295'),
        (['--tasks', 'loss', '--text', 'nothing'], "'nothing' is not of the form NAME=FILE."),
        (['--tasks', 'loss', '--text', 'a=nowhere.txt'], "No file matches 'nowhere.txt'."),
        (['--tasks', 'loss', '--text', 'a=b', '--run', 'c'], 'Give --text or --run, not both.'),
        (
            ['--tasks', 'boolq', '--data', 'gsm8k=x'],
            "There are questions of 'gsm8k', which is none of the tasks boolq.",
        ),
        (['--tasks', 'boolq', '--data', 'boolq=nowhere'], "There is no file 'nowhere' with the questions of boolq."),
        (['--tasks', 'gsm8k', '--mode', 'log-likelihood'], 'The answers of gsm8k are free'),
        (['--tasks', 'boolq', '--half-life', '3'], '--half-life belongs to averages: add --rule.'),
        (
            ['--tasks', 'boolq', '--rule', 'ema', '--at', '4', '--every-update'],
            'Give --at or --every-update, not both.',
        ),
        (['--tasks', 'boolq', '--rule', 'ema', '--average', 'EMA'], '--average belongs to one checkpoint'),
        (['--tasks', 'boolq', '--half-life', '0'], '--half-life belongs to averages: add --rule.'),
        (['--tasks', 'boolq', '--initial-model', 'x'], '--initial-model belongs to averages: add --rule.'),
        (['--tasks', 'boolq', '--rule', 'training', '--lag', '3'], "The rule 'training' has no setting 'lag'"),
        (['--tasks', 'boolq', '--every-update'], '--every-update belongs to averages: add --rule.'),
        (['--tasks', 'boolq', '--rule', 'training', '--rule', 'training'], "The rule 'training' is there twice."),
        (['--tasks', 'boolq', '--rule', 'median'], "There is no rule 'median'"),
        (['--tasks', 'boolq', '--rule', 'ema'], 'is one checkpoint, not a directory of them'),
        (['--tasks', 'boolq', '--weights', 'training'], 'has one set of weights: leave the choice out.'),
        (['--tasks', 'boolq', '--average', 'BEMA'], 'has one set of weights: leave the choice out.'),
        (['--tasks', 'boolq', '--dtype', 'int8'], 'dtype must be'),
        (['--tasks', 'boolq', '--device', 'abacus'], "There is no device 'abacus' here: "),
        (['--tasks', 'boolq', '--device', 'cuda:77'], "There is no device 'cuda:77' here: "),
    ],
)
def test_wrong_input(model, tmp_path, arguments, message):
    result = evaluate(model, *arguments, '--out', tmp_path / 'out')
    assert result.exit_code == 2
    assert message in ' '.join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_results_are_not_overwritten(model, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/results.jsonl').write_text('mine')
    result = evaluate(model, '--tasks', 'boolq', f'--data=boolq={FILES["boolq"]}', '--out', tmp_path / 'out')
    assert result.exit_code == 2
    assert (tmp_path / 'out/results.jsonl').read_text() == 'mine'


def test_without_the_harness_losses_are_measured(model, tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('Only the texts are read here. ' * 20)
    with mock.patch.dict('sys.modules', {'lm_eval': None}):
        refused = evaluate(model, '--tasks', 'boolq', '--out', tmp_path / 'out')
        assert refused.exit_code == 2
        assert "pip install 'composer_bema[eval]'" in refused.output
        arguments = ['--tasks', 'loss', f'--text=a={text}', '--max-seq-len', 64, '--out', tmp_path / 'out']
        assert evaluate(model, *arguments).exit_code == 0


def test_a_suite_measures_any_number_of_models():
    suite = Suite(['boolq'], Protocol('log-likelihood'), files={'boolq': FILES['boolq']})
    measure = suite.prepare(make_tokenizer(), make_model())
    first, again = measure(make_model())[0], measure(make_model())[0]
    assert first == again
    other = type(make_model())(make_model().config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.0)
    # All choices are equally likely, and the first one, no, is taken: right where the answer is no.
    assert measure(other)[0][0].value == 0.5


def test_a_context_that_is_too_short_is_noticed_before_averages_are_computed(tmp_path):
    class Unread:
        tokenizer, model = make_tokenizer(), make_model(context=128)

        def models(self):
            raise AssertionError('checkpoints are read')

    target: Any = Unread()
    with pytest.raises(ValueError, match='An answer may have 256 tokens, but the context of the model only 128'):
        run_evaluation(target, Suite(['boolq'], files={'boolq': FILES['boolq']}), tmp_path / 'out')


def test_what_is_terminated_leaves_nothing(run, tmp_path, monkeypatch):
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    written = []

    def terminated(folder, *_):
        written.extend(folder.iterdir())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr('composer_bema.evaluation.targets._load', terminated)
    before = signal.getsignal(signal.SIGTERM)
    checkpoint = next((run / 'checkpoints').glob('ep*-ba6-rank0.pt'))
    result = evaluate(checkpoint, '--tasks', 'loss', '--out', tmp_path / 'out')
    assert result.exit_code == 128 + signal.SIGTERM
    assert written[0].is_relative_to(tmp_path / 'temporary')
    assert [path.name for path in tmp_path.rglob('*')] == ['temporary']
    assert signal.getsignal(signal.SIGTERM) == before
