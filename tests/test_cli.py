# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The command line: what it prints, and the one sentence that a mistake gets."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from composer_bema.cli import main
from composer_bema.cli.averages import RULE_HELP
from composer_bema.flops import Architecture
from composer_bema.offline.settings import RULES, settings_of
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


def test_report(tmp_path, checkpoint):
    folder = os.path.dirname(os.path.dirname(checkpoint)) + '/run'
    out = tmp_path / 'page.html'
    result = run('report', folder, '--out', str(out))
    assert (result.exit_code, result.stdout) == (0, f"Wrote '{out}'.\n"), result.output
    assert out.read_text().startswith('<!doctype html>')
    result = run('report', folder)
    assert (result.exit_code, result.stdout) == (0, f"Wrote '{folder}/report.html'.\n")


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['none'], "No such folder of a run: 'none'."),
        (['.'], "'.' is no folder of a run: there is no config.yaml in it."),
        (['run', '--out', 'none/x.html'], "There is no folder 'none' for the page 'none/x.html': make it, or name"),
    ],
)
def test_report_says_what_is_wrong(checkpoint, monkeypatch, arguments, sentence):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(checkpoint)))
    result = run('report', *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f'Error: {sentence}')
    assert result.stderr.count('\n') == 1


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


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Five checkpoints of a few numbers, at the steps 10 to 50."""
    folder = tmp_path_factory.mktemp('trajectory')
    for step in range(10, 60, 10):
        save_file({'weight': torch.full((3,), float(step))}, folder / f'model-{step}.safetensors')
    return str(folder)


def assert_is_one_sentence(result, sentence):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith('Error: ')
    assert result.stderr.count('\n') == 1
    assert sentence in result.stderr
    assert 'Traceback' not in result.output


def test_stabilize_writes(tmp_path, checkpoints):
    out = tmp_path / 'out'
    result = run('stabilize', checkpoints, '--rule', 'lawa', '--window', '3', '--out', str(out))
    assert (result.exit_code, result.stdout) == (0, f"Wrote lawa window=3 to '{out}'.\n"), result.output
    assert load_file(out / 'model.safetensors')['weight'].tolist() == [40.0] * 3
    options = ['--window', '2', '--at', '20', '--at', '50', '--dtype', 'float64', '--out', str(tmp_path / 'two')]
    result = run('stabilize', checkpoints, '--rule', 'lawa', *options)
    assert result.stdout == f"Wrote lawa window=2 to '{tmp_path}/two/step20', '{tmp_path}/two/step50'.\n"
    assert load_file(tmp_path / 'two' / 'step20' / 'model.safetensors')['weight'].dtype == torch.float64


def test_a_dry_run_prints_coefficients_and_reads_nothing(tmp_path):
    for step in (10, 20, 30):
        (tmp_path / f'model-{step}.safetensors').write_text('no tensors')
    result = run(
        'stabilize', str(tmp_path), '--rule', 'ema', '--smoothing', '0.75', '--update-after', '10', '--dry-run'
    )
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[2:]]
    assert rows == [['10', '0.562500'], ['20', '0.187500'], ['30', '0.250000']]
    assert 'ema smoothing=0.75 update_after=10' in result.stdout
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(('rank', 'says'), [('0', True), ('3', False)])
def test_of_several_processes_one_prints(checkpoints, monkeypatch, rank, says):
    monkeypatch.setenv('RANK', rank)
    monkeypatch.setenv('WORLD_SIZE', '4')
    result = run('stabilize', checkpoints, '--rule', 'lawa', '--window', '2', '--dry-run')
    assert result.exit_code == 0, result.output
    assert ('lawa window=2' in result.stdout) == bool(result.stdout) == says


def test_none_switches_a_power_off(checkpoints):
    def coefficients(*options):
        result = run('stabilize', checkpoints, '--rule', 'bema', '--update-after', '10', '--dry-run', *options)
        assert result.exit_code == 0, result.output
        return [float(line.split()[1]) for line in result.stdout.splitlines()[2:]]

    # No history is kept, and nothing is added to the last checkpoint.
    assert coefficients('--ema-power', 'none', '--bias-power', 'NONE') == [0, 0, 0, 0, 1]
    # An EMA, which halves what it has at each update.
    halves = coefficients('--half-life', '10', '--bias-power', 'none')
    assert halves == pytest.approx([1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
    assert coefficients('--half-life', '10') != halves


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['--rule', 'lawa', '--window', '2', '--lag', '3'], "The rule 'lawa' has no setting 'lag', but window."),
        (['--rule', 'lawa'], "The rule 'lawa' needs the setting 'window'."),
        (
            ['--rule', 'law'],
            "There is no rule 'law', but bema, ema, ouema, dema, lawa, swa_window, decay_merge, training.",
        ),
        (['--rule', 'bema'], 'name them as the initial model (--initial-model), or start later (--update-after 10).'),
        (['--rule', 'bema', '--update-after', '50'], 'has no update: no checkpoint'),
        (['--rule', 'lawa', '--window', '2', '--at', '15'], 'has no update at step 15, but at 10, 20, 30, 40, 50.'),
        (['--rule', 'lawa', '--window', '2', '--dtype', 'fp8'], 'dtype must be one of float32, bfloat16'),
        (['--rule', 'lawa', '--window', '2', '--format', 'x'], "format must be one of huggingface, composer, not 'x'."),
        (['--rule', 'lawa', '--window', '2', '--format', 'composer'], 'is no checkpoint of Composer'),
        (['--rule', 'lawa', '--window', '2', '--copy', 'bias'], "The pattern 'bias' of what is to be copied fits no"),
        (['--rule', 'bema', '--initial-model', '/no/where'], "'/no/where' is neither a folder nor a model"),
        (['--rule', 'lawa', '--window', '2', '--max-shard-size', 'much'], 'much'),
        (['--rule', 'lawa', '--window', '2', '--out', '/'], "'/' exists and is not an empty folder"),
    ],
)
def test_stabilize_says_what_is_wrong(tmp_path, checkpoints, arguments, sentence):
    out = tmp_path / 'made' / 'for' / 'it'
    assert_is_one_sentence(run('stabilize', checkpoints, '--out', str(out), *arguments), sentence)
    assert not list(tmp_path.iterdir())


def test_stabilize_of_what_is_not_there(tmp_path):
    arguments = ['--rule', 'lawa', '--window', '2', '--out', str(tmp_path / 'out')]
    assert_is_one_sentence(run('stabilize', f'{tmp_path}/nowhere', *arguments), 'No such directory of checkpoints')
    assert_is_one_sentence(run('stabilize', str(tmp_path), *arguments), 'holds no checkpoints')
    (tmp_path / 'model-1.safetensors').write_text('no tensors')
    assert_is_one_sentence(run('stabilize', str(tmp_path), *arguments), 'model-1.safetensors')


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['--rule', 'lawa', '--window', '2'], "Missing option '--out'."),
        (['--rule', 'ema', '--ema-power', 'high'], "Invalid value for '--ema-power': 'high' is not a valid float."),
        (['--rule', 'lawa', '--at', '-1'], "Invalid value for '--at'"),
        (['--window', '2'], "Missing option '--rule'."),
        (['--rule', 'lawa', '--windw', '2'], "No such option '--windw'"),
    ],
)
def test_wrong_usage(checkpoints, arguments, sentence):
    result = run('stabilize', checkpoints, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert 'Traceback' not in result.output


def test_weights_of_several_rules_and_their_picture(tmp_path, checkpoints):
    picture = tmp_path / 'weights.png'
    rules = ['--rule', 'lawa', '--rule', 'decay_merge', '--rule', 'ema']
    options = ['--window', '2', '--decay', 'linear', '--update-after', '10', '--out', str(picture)]
    result = run('weights', checkpoints, *rules, *options)
    assert result.exit_code == 0, result.output
    *table, drawn = result.stdout.splitlines()
    assert 'lawa window=2' in table[0] and 'decay_merge window=2 decay=linear' in table[0]
    assert [line.split()[:2] for line in table[2:]] == [
        ['10', '0.000000'],
        ['20', '0.000000'],
        ['30', '0.000000'],
        ['40', '0.500000'],
        ['50', '0.500000'],
    ]
    assert drawn == f"Drew '{picture}'."
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_a_picture_without_a_folder_is_refused_at_once(tmp_path, checkpoints):
    picture = tmp_path / 'none' / 'weights.png'
    result = run('weights', checkpoints, '--rule', 'lawa', '--window', '2', '--out', str(picture))
    assert_is_one_sentence(result, f"There is no folder '{picture.parent}' for the picture '{picture}'")
    assert not result.stdout


def test_an_option_that_no_rule_has(checkpoints):
    result = run('weights', checkpoints, '--rule', 'lawa', '--rule', 'decay_merge', '--window', '2', '--lag', '3')
    assert_is_one_sentence(result, "The rule 'lawa' has no setting 'lag', but window.")


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / 'sweep.yaml'
    path.write_text('averages:\n  rule: lawa\n  window: [2, 3]\nwrite: {}\n')
    return str(path)


def test_sweep(tmp_path, checkpoints, grid):
    out = tmp_path / 'out'
    result = run('sweep', checkpoints, '--config', grid, '--out', str(out), 'averages.window=[1, 4]')
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {'lawa,window=1', 'lawa,window=4'}
    assert load_file(out / 'lawa,window=4' / 'step50' / 'model.safetensors')['weight'].tolist() == [35.0] * 3
    assert result.stdout.splitlines()[0].split() == ['rule', 'window', 'step', 'folder']


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['averagess=1'], "averagess is not a setting; the nearest one is 'averages'."),
        (['averages.windw=2'], "averages: The rule 'lawa' has no setting 'windw', but window."),
        (['write=null'], 'A sweep needs one of two sections'),
        (['at=[3]'], 'has no update at step 3'),
        (['--config', 'nothing.yaml'], "No such settings file: 'nothing.yaml'."),
        (['--out', '/'], "'/' exists and is not an empty folder"),
    ],
)
def test_sweep_says_what_is_wrong(tmp_path, checkpoints, grid, arguments, sentence):
    result = run('sweep', checkpoints, '--config', grid, '--out', str(tmp_path / 'out'), *arguments)
    assert_is_one_sentence(result, sentence)
    assert not (tmp_path / 'out').exists()


def test_the_help_of_the_module_needs_no_torch(tmp_path):
    """As launchers start it, and in a second."""
    # A folder first on the path, in which torch is no module that could be imported.
    (tmp_path / 'torch.py').write_text('raise AssertionError')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}

    def output(*arguments):
        command = [sys.executable, '-m', 'composer_bema', *arguments]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    commands = (['--help'], ['stabilize', '-h'], ['sweep', '-h'], ['weights', '-h'], ['flops', '-h'], ['--version'])
    for arguments in commands:
        assert output(*arguments).startswith(('Usage: composer-bema', 'composer-bema, version'))
    # Nor does counting.
    assert 'forward FLOPs per token' in output('flops', *numbers(sequence_length=8))


def test_every_setting_of_every_rule_has_an_option_that_says_its_default():
    """The command line knows them without importing torch, and so they stand there a second time."""
    options = {parameter.name: parameter for parameter in main.commands['stabilize'].params}
    for rule in RULES:
        assert rule in RULE_HELP
        for name, setting in settings_of(rule).items():
            assert name in options
            default = setting.default
            if default not in (None, setting.empty):
                shown = f'{default:g}' if isinstance(default, float) else default
                assert options[name].help.endswith(f'[default: {shown}]'), name


NUMBERS = {
    '--hidden-size': '384',
    '--intermediate-size': '1024',
    '--num-hidden-layers': '8',
    '--num-attention-heads': '6',
    '--vocab-size': '50257',
}


def numbers(**changes):
    options = {**NUMBERS, **{f'--{name.replace("_", "-")}': str(value) for name, value in changes.items()}}
    return [part for option in options.items() for part in option]


def counts(*arguments):
    """The table's exact numbers."""
    result = run('flops', *arguments)
    assert result.exit_code == 0, result.output
    rows = [re.split(r'\s{2,}', line.strip()) for line in result.stdout.splitlines()[2:]]
    assert all(float(about) == float(f'{int(exactly.replace(",", "")):.3g}') for _, exactly, about in rows)
    return {name: int(exactly.replace(',', '')) for name, exactly, _ in rows}


def test_flops_by_numbers():
    assert counts(*numbers(sequence_length=512, tokens='1e9')) == {
        'parameters': 33454464,
        'tokens in a sequence': 512,
        'forward FLOPs per token': 57278201856 // 512,
        'forward FLOPs per sequence': 57278201856,
        'training FLOPs per token': 3 * 57278201856 // 512,
        'training FLOPs per sequence': 3 * 57278201856,
        'tokens of training': 10**9,
        'training FLOPs in total': 3 * 57278201856 // 512 * 10**9,
    }
    experts = counts(*numbers(sequence_length=512, num_experts=8, num_experts_per_tok=2))
    assert (experts['parameters'], experts['forward FLOPs per sequence']) == (99514752, 66941976576)
    assert experts['parameters that a token meets'] == 33454464 + 8 * 3 * 384 * 1024
    untied = counts(*numbers(sequence_length=512), '--no-tie-word-embeddings', '--no-gated-mlp')
    assert untied['parameters'] == 33454464 + 50257 * 384 - 8 * 384 * 1024


def test_flops_of_a_folder_and_of_its_file(tmp_path):
    config = {'model_type': 'gpt2', 'n_embd': 768, 'n_layer': 12, 'n_head': 12, 'vocab_size': 50257}
    (tmp_path / 'config.json').write_text(json.dumps(config | {'n_positions': 1024}))
    table = counts(str(tmp_path))
    assert (table['parameters'], table['tokens in a sequence']) == (123532032, 1024)
    assert counts(f'{tmp_path}/config.json') == table
    assert counts(str(tmp_path), '--sequence-length', '512')['forward FLOPs per sequence'] == 175797436416
    (tmp_path / 'config.json').write_text(json.dumps(config))
    result = run('flops', str(tmp_path))
    assert result.exit_code == 2
    assert "Missing option '--sequence-length'." in result.stderr


def test_flops_of_a_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / 'config.json').write_text(
        json.dumps({'model_type': 'gpt2', 'n_embd': 8, 'n_layer': 1, 'n_head': 2, 'vocab_size': 9, 'n_positions': 4})
    )
    asked = []
    monkeypatch.setattr(
        'huggingface_hub.snapshot_download', lambda name, **kwargs: asked.append((name, kwargs)) or str(tmp_path)
    )
    assert counts('some/model') == counts(str(tmp_path))
    assert asked == [('some/model', {'allow_patterns': ['config.json']})]


def test_flops_of_a_yaml(yaml):
    table = counts(yaml)
    # One layer, 16 wide, and 259 bytes; steps of four rows of 32 tokens.
    assert table['parameters'] == 259 * 16 + 4 * 16 * 16 + 3 * 16 * 32
    assert (table['tokens in a sequence'], table['tokens of training']) == (32, 6 * 4 * 32)
    assert table['training FLOPs in total'] == 6 * 4 * table['training FLOPs per sequence']
    assert counts(yaml, 'max_seq_len=64')['tokens of training'] == 6 * 4 * 64
    assert counts(yaml, '--tokens', '10')['tokens of training'] == 10
    assert 'training FLOPs in total' not in counts(yaml, 'max_duration=2ep')


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['nothing.yaml'], "No such settings file: 'nothing.yaml'."),
        (['/no/where'], "'/no/where' is neither a folder nor a model that could be downloaded"),
        (['tests'], "There is no 'tests/config.json'"),
        (['tests/test_cli.py'], "'tests/test_cli.py' is not valid JSON"),
        (numbers(sequence_length=8, num_experts=4), 'num_experts_per_tok must lie between 1 and num_experts=4'),
        (numbers(sequence_length=8, hidden_size=385), 'hidden_size=385 is no multiple of num_attention_heads=6'),
    ],
)
def test_flops_says_what_is_wrong(arguments, sentence, monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    assert_is_one_sentence(run('flops', *arguments), sentence)


def test_flops_of_a_yaml_says_what_is_wrong(yaml):
    assert_is_one_sentence(run('flops', yaml, 'max_durations=1'), 'max_durations is not a setting')
    assert_is_one_sentence(run('flops', yaml, 'model.config.model_type=olmo'), "The model_type 'olmo' is none whose")


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        ([], "Without a TARGET, the option '--hidden-size' is needed."),
        (['--hidden-size', '8'], "Without a TARGET, the option '--intermediate-size' is needed."),
        (['folder', '--num-experts', '8'], 'Give a TARGET or the numbers (--num-experts), not both.'),
        (['tests', 'max_duration=1ep'], "'max_duration=1ep': only the settings of a YAML can be overridden."),
        (numbers(), "Missing option '--sequence-length'."),
        (numbers(sequence_length=0), "Invalid value for '--sequence-length'"),
        (numbers(sequence_length=8, tokens='1.5'), "'1.5' is no positive whole number."),
        (numbers(sequence_length=8, tokens='inf'), "'inf' is no positive whole number."),
        (numbers(sequence_length=8, tokens='-5'), "'-5' is no positive whole number."),
        (numbers(sequence_length=8, tokens='many'), "'many' is not a valid float."),
    ],
)
def test_wrong_usage_of_flops(arguments, sentence):
    result = run('flops', *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert 'Traceback' not in result.output


def test_every_size_of_an_architecture_has_an_option():
    options = {parameter.name for parameter in main.commands['flops'].params}
    assert {field.name for field in dataclasses.fields(Architecture)} <= options
