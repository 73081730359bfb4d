# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Branches of a tiny run at a constant rate: where they start and end, and what they leave alone."""

import hashlib
import shutil

import pytest
from click.testing import CliRunner

from composer_bema.cli import main
from composer_bema.formats.composer import open_checkpoint
from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.cooldown import cooldown_config
from composer_bema.training.outputs import read_metrics
from composer_bema.training.run import train
from tests.training.tiny import tiny_settings, write_yaml

LR = 1e-2
LR_NAME = 'lr-DecoupledAdamW/group0'


def constant_run(folder, **changes):
    """Trains ten steps, a checkpoint each, with two averages; returns the run's folder. An epoch has nine steps."""
    settings = {
        **tiny_settings(folder),
        'max_duration': '10ba',
        'eval_interval': '5ba',
        'save_folder': '${run_folder}/checkpoints',
        'save_interval': '1ba',
        'scheduler': {'name': 'constant_with_warmup', 't_warmup': '2ba'},
        'callbacks': {'lr_monitor': {}, 'flops_monitor': {'sequence_length': 32}},
        'algorithms': {
            'bema': {'update_freq': '2ba', 'eval_labels': ['one'], 'save_weights': 'average'},
            'lawa': {'update_freq': '2ba', 'window': 2, 'eval_labels': ['two']},
        },
        **changes,
    }
    train(load_config(write_yaml(folder, settings)))
    return folder / 'run'


@pytest.fixture(scope='module')
def shared_run(tmp_path_factory):
    return constant_run(tmp_path_factory.mktemp('constant'))


@pytest.fixture
def run(shared_run, tmp_path):
    """A copy of the run, moved from where it was trained."""
    return shutil.copytree(shared_run, tmp_path / 'long', symlinks=True)


def checkpoint(run, step):
    (path,) = (run / 'checkpoints').glob(f'ep*-ba{step}-rank0.pt')
    return path


def contents(folder):
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob('*')
        if path.is_file()
    }


def logged(folder, name):
    return {record['batch']: record[name] for record in read_metrics(folder / 'metrics.jsonl') if name in record}


def test_a_branch_decays_to_the_end_and_leaves_the_run_alone(run):
    before = contents(run)
    report = train(cooldown_config(run, 0.4, 'linear'))
    branch = run.with_name('long-cooldown-6ba-10ba-linear')
    assert contents(run) == before
    assert sorted(path.name for path in branch.iterdir()) == [
        'checkpoints',
        'config.yaml',
        'curves.png',
        'metrics.jsonl',
    ]
    assert str(branch / 'metrics.jsonl') in report
    # What is logged after a step is what the next one trains with: Composer's schedules lag by one.
    rates = logged(branch, LR_NAME)
    assert rates == pytest.approx({7: LR, 8: 0.75 * LR, 9: 0.5 * LR, 10: 0.25 * LR})
    # Until the first smaller step it is the run itself, on the run's own batches.
    ours, theirs = logged(branch, 'loss/train/total'), logged(run, 'loss/train/total')
    assert list(ours) == [6, 7, 8, 9] and [step for step in ours if ours[step] == theirs[step]] == [6, 7, 8]
    assert logged(branch, 'flops/total') == {
        step: flops for step, flops in logged(run, 'flops/total').items() if step > 6
    }
    last, theirs = open_checkpoint(checkpoint(branch, 10)), open_checkpoint(checkpoint(run, 10))
    for name in ('BEMA', 'LAWA'):
        assert last.averages[name].header['num_updates'] == theirs.averages[name].header['num_updates'] == 5


@pytest.mark.parametrize(
    ('fraction', 'at', 'start', 'end'),
    [
        (0.2, None, '8ba', '10ba'),
        # From 7.5, and there is no checkpoint between steps.
        (0.25, None, '7ba', '9ba'),
        (0.5, 4, '4ba', '8ba'),
        (0.5, 10, '10ba', '20ba'),
        # 1 - 0.8 is a little less than a fifth in binary.
        (0.7, None, '3ba', '10ba'),
    ],
)
def test_where_a_branch_starts_and_ends(run, fraction, at, start, end):
    config = cooldown_config(run, fraction, '1-sqrt', at=at)
    step = start.removesuffix('ba')
    assert config.load_path == str(checkpoint(run, step)) and not config.load_weights_only
    assert config.max_duration == end
    length = int(end.removesuffix('ba')) - int(step)
    assert config.scheduler == {
        'name': 'warmup_stable_decay',
        't_decay': f'{length}ba',
        't_max': end,
        'decay': '1-sqrt',
    }
    suffix = f'-cooldown-{start}-{end}-1-sqrt'
    assert config.run_folder == f'{run}{suffix}' and config.run_name == f'tiny{suffix}'
    assert config.save_folder == f'{run}{suffix}/checkpoints'
    # A checkpoint is as good as its step.
    assert cooldown_config(checkpoint(run, step), fraction, '1-sqrt') == config


@pytest.mark.parametrize(
    ('max_duration', 'start', 'end'),
    [('1280tok', '1024tok', '1280tok'), ('40sp', '32sp', '40sp'), ('1ep', '7ba', '9ba')],
)
def test_durations_in_other_units(tmp_path, max_duration, start, end):
    """A step has four samples of 32 tokens, and an epoch nine steps."""
    run = constant_run(tmp_path, max_duration=max_duration, scheduler={'name': 'constant'}, algorithms={})
    config = cooldown_config(run, 0.2, 'linear')
    assert (config.scheduler['t_max'], config.max_duration) == (end, end)
    suffix = f'-cooldown-{start}-{end}-linear'
    assert config.run_name.endswith(suffix)
    train(config)
    assert logged(run.with_name(f'run{suffix}'), 'loss/train/total')


def test_overrides_win(run, tmp_path):
    changes = [f'run_folder={tmp_path}/other', 'save_folder=null', 'eval_loader=null', 'algorithms={}']
    config = cooldown_config(run, 0.2, 'exponential', ['scheduler.alpha_f=0.1', 'run_name=other', *changes])
    assert config.scheduler['alpha_f'] == 0.1 and config.scheduler['decay'] == 'exponential'
    assert (config.run_name, config.run_folder, config.save_folder) == ('other', f'{tmp_path}/other', None)


def test_a_branch_that_is_there_is_refused_or_replaced(run):
    train(cooldown_config(run, 0.4, 'linear'))
    branch = run.with_name('long-cooldown-6ba-10ba-linear')
    before = contents(branch)
    with pytest.raises(
        ConfigError, match="'.*long-cooldown-6ba-10ba-linear' holds a run already; .* save_overwrite=true"
    ):
        train(cooldown_config(run, 0.4, 'linear'))
    assert contents(branch) == before
    train(cooldown_config(run, 0.4, 'linear', ['save_overwrite=true', 'save_interval=3ba']))
    assert [path.name for path in (branch / 'checkpoints').iterdir() if '-ba8-' in path.name] == []
    records = [record for record in read_metrics(branch / 'metrics.jsonl') if 'loss/train/total' in record]
    assert [record['batch'] for record in records] == [6, 7, 8, 9]


def test_another_shape_is_another_branch(run):
    """And one in the same folder is refused, even where a branch may go on."""
    autoresume = 'autoresume=true'
    train(cooldown_config(run, 0.4, 'linear', [autoresume]))
    train(cooldown_config(run, 0.4, 'cosine', [autoresume]))
    rates = [logged(run.with_name(f'long-cooldown-6ba-10ba-{shape}'), LR_NAME) for shape in ('linear', 'cosine')]
    assert rates[0][8] == pytest.approx(0.75 * LR) and rates[1][8] == pytest.approx((2 + 2**0.5) / 4 * LR)
    folder = run.with_name('long-cooldown-6ba-10ba-linear')
    same = [autoresume, f'run_folder={folder}', f'save_folder={folder}/checkpoints']
    with pytest.raises(ConfigError, match="holds a branch with the schedule .*'linear'.*, and this one has .*'square'"):
        cooldown_config(run, 0.4, 'square', same)


@pytest.mark.parametrize('where', ['.', '..'])
def test_a_run_that_is_named_from_within(run, monkeypatch, where):
    monkeypatch.chdir(run if where == '.' else run / 'checkpoints')
    assert cooldown_config(where, 0.2, 'linear').run_folder == f'{run}-cooldown-8ba-10ba-linear'


def test_a_link_to_the_latest_checkpoint_is_followed(run):
    config = cooldown_config(run / 'checkpoints' / 'latest-rank0.pt', 0.5, 'linear')
    assert config.load_path == str(checkpoint(run, 10))


@pytest.mark.parametrize('name', ['run \U0001f40e', "it's: a #run"])
def test_folders_of_any_name(shared_run, tmp_path, name):
    run = shutil.copytree(shared_run, tmp_path / name)
    assert cooldown_config(run, 0.2, 'linear').load_path == str(checkpoint(run, 8))


def test_a_save_folder_with_the_name_of_the_run(tmp_path):
    run = constant_run(tmp_path, save_folder=str(tmp_path / '{run_name}' / 'saved'), algorithms={})
    config = cooldown_config(run, 0.2, 'linear')
    assert config.load_path == str(tmp_path / 'tiny' / 'saved' / 'ep0-ba8-rank0.pt')
    assert config.save_folder == str(tmp_path / '{run_name}' / 'saved')
    for save_folder in ('null', 's3://bucket/run'):
        (run / 'config.yaml').write_text(
            (run / 'config.yaml').read_text().replace(f"'{tmp_path}/{{run_name}}/saved'", '')
        )
        text = (run / 'config.yaml').read_text()
        lines = [
            f'save_folder: {save_folder}' if line.startswith('save_folder:') else line for line in text.splitlines()
        ]
        (run / 'config.yaml').write_text('\n'.join(lines))
        with pytest.raises(ConfigError, match=f'had save_folder={save_folder}, and has left no checkpoint on this'):
            cooldown_config(run, 0.2, 'linear')


def test_a_branch_that_was_killed_goes_on(run):
    stopped = cooldown_config(run, 0.4, 'linear', ['max_duration=8ba', 'autoresume=true'])
    train(stopped)
    train(cooldown_config(run, 0.4, 'linear', ['autoresume=true']))
    branch = run.with_name('long-cooldown-6ba-10ba-linear')
    assert list(logged(branch, 'loss/train/total')) == [6, 7, 8, 9]
    assert logged(branch, LR_NAME)[10] == pytest.approx(0.25 * LR)


@pytest.mark.parametrize(
    ('target', 'kwargs', 'message'),
    [
        ('', {'fraction': 0.0}, 'fraction must lie between 0 and 1, the whole branch, but is 0.0'),
        ('', {'fraction': 1.0}, 'fraction must lie between 0 and 1'),
        ('', {'fraction': 0.95}, r'starts at 0\.5ba, before its first checkpoint, of 1ba: name one'),
        (
            '',
            {'fraction': 0.5, 'at': 11},
            r'There is no checkpoint of step 11 of the run in .*; the nearest is of 10\.',
        ),
        (
            'checkpoints/ep0-ba4-rank0.pt',
            {'fraction': 0.5, 'at': 3},
            'is one checkpoint, which leaves no choice of step 3',
        ),
        ('checkpoints/ep0-ba4-rank0.pt', {'fraction': 0.1}, 'has no step: give a larger fraction'),
        (
            'checkpoints/ep0-ba1-rank0.pt',
            {'fraction': 0.5},
            r"is 0, and the optimizer's own is 0\.01: a cooldown starts",
        ),
        ('checkpoints/ep0-ba99-rank0.pt', {}, "No such run or checkpoint: '.*ep0-ba99-rank0.pt'"),
        (
            '',
            {'overrides': ['run_folder=${save_folder}', 'save_folder={run}/checkpoints']},
            'where the run itself writes',
        ),
    ],
)
def test_what_cannot_be_a_branch_is_one_sentence(run, target, kwargs, message):
    before = contents(run)
    settings = {'fraction': 0.2, 'decay': 'linear', **kwargs}
    run.with_name('long-link').symlink_to(run)
    places = {'{run}': str(run), '{parent}': str(run.parent)}
    for name, place in places.items():
        settings['overrides'] = [text.replace(name, place) for text in settings.get('overrides', [])]
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        cooldown_config(run / target, **settings)
    assert contents(run) == before


def test_a_rate_that_decays_already_is_refused(tmp_path):
    run = constant_run(tmp_path, scheduler={'name': 'cosine'}, algorithms={})
    with pytest.raises(ConfigError, match='a cooldown starts where the schedule leaves that as it is'):
        cooldown_config(run, 0.2, 'linear')


def test_checkpoints_that_nobody_goes_on_from(tmp_path):
    run = constant_run(tmp_path, save_weights_only=True, algorithms={})
    with pytest.raises(ConfigError, match='was saved with save_weights_only, and no training goes on from that'):
        cooldown_config(run, 0.2, 'linear')
    shutil.rmtree(run / 'checkpoints')
    with pytest.raises(ConfigError, match="has left no checkpoint in '.*checkpoints': name one"):
        cooldown_config(run, 0.2, 'linear')


def test_a_checkpoint_outside_of_any_run(run, tmp_path):
    path = shutil.copy(checkpoint(run, 8), tmp_path)
    with pytest.raises(ConfigError, match=r'lies in none: there is no config\.yaml\. Train a YAML .* load_path'):
        cooldown_config(path, 0.2, 'linear')


def test_files_of_the_run_elsewhere_are_left_alone(tmp_path):
    exported = {'hf_checkpointer': {'save_folder': str(tmp_path / 'exported')}}
    run = constant_run(tmp_path, callbacks=exported, save_folder=str(tmp_path / 'saved'), algorithms={})
    with pytest.raises(
        ConfigError, match=r"save_folder is '.*saved', where the run itself writes: .* save_folder=\.\.\."
    ):
        cooldown_config(run, 0.2, 'linear')
    elsewhere = [f'save_folder={tmp_path}/saved-too']
    with pytest.raises(ConfigError, match=r"callbacks\.hf_checkpointer\.save_folder is '.*exported', where the run"):
        cooldown_config(run, 0.2, 'linear', elsewhere)
    cooldown_config(run, 0.2, 'linear', [*elsewhere, f'callbacks.hf_checkpointer.save_folder={tmp_path}/exported-too'])


def test_the_command(run, caplog):
    with caplog.at_level('INFO', 'composer_bema'):
        dry = CliRunner().invoke(main, ['cooldown', str(run), '--fraction', '0.4', '--dry-run'])
    assert dry.exit_code == 0, dry.output
    assert "ba6-rank0.pt' the learning rate decays until 10ba; the branch is kept in" in caplog.text
    assert not run.with_name('long-cooldown-6ba-10ba-1-sqrt').exists()
    result = CliRunner().invoke(main, ['cooldown', str(run), '--at', '4', '--fraction', '0.5', 'eval_interval=4ba'])
    assert result.exit_code == 0, result.output
    assert 'long-cooldown-4ba-8ba-1-sqrt/metrics.jsonl' in result.output
    wrong = CliRunner().invoke(main, ['cooldown', str(run), '--decay', 'exponential', '--dry-run'])
    assert wrong.exit_code == 2
    assert "scheduler: alpha_f must be above 0 where decay='exponential'" in wrong.output
