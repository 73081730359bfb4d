# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The page about a run: well-formed, by itself, with the numbers of the metrics, and plain about what is not there."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.outputs import evaluation_curves, read_metrics, write_settings
from composer_bema.training.run import train
from composer_bema.training.run_page import write_run_page
from tests.training.tiny import tiny_settings, write_yaml

# Of HTML, those without an end.
VOID = {'meta', 'link', 'br', 'img', 'hr', 'input'}
EMBEDDED = {'script', 'img', 'iframe', 'object', 'embed', 'audio', 'video', 'form', 'base'}


class Page(HTMLParser):
    """A page in pieces, and complaints about what is wrong with it."""

    def __init__(self, path):
        super().__init__()
        self.complaints, self.open, self.ids, self.links, self.tables = [], [], [], [], []
        self.text, self.notes, self.pictures, self.headings, self.captions = '', [], [], [], []
        self.facts = {}
        self.source = path.read_text(encoding='utf-8')
        self.feed(self.source)
        self.close()
        self.complaints += [f'<{tag}> is not closed' for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self._element(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('th', 'td'):
            self.tables[-1][-1].append('')
        elif tag == 'li' and self.open.count('nav') == 0:
            self.notes.append('')
        elif tag in ('h1', 'h2', 'h3'):
            self.headings.append('')

    def handle_startendtag(self, tag, attrs):
        self._element(tag, dict(attrs))

    def _element(self, tag, attributes):
        if tag in EMBEDDED:
            self.complaints.append(f'<{tag}>')
        if 'id' in attributes:
            self.ids.append(attributes['id'])
        for name, value in attributes.items():
            if name.startswith('on'):
                self.complaints.append(f'{tag} {name}={value}')
            if name in ('src', 'href', 'xlink:href', 'data', 'srcset', 'action'):
                self.links.append(value)
        if tag == 'th' and 'scope' not in attributes:
            self.complaints.append('a header of a table without a scope')
        if attributes.get('role') == 'img':
            self.pictures.append(attributes['aria-label'])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.complaints.append(f'</{tag}> closes something else')

    def handle_data(self, data):
        if 'style' in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ('th', 'td'):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == 'dt':
            self.facts[data] = ''
        if self.open and self.open[-1] == 'dd':
            self.facts[[*self.facts][-1]] += data
        if 'li' in self.open and 'nav' not in self.open:
            self.notes[-1] += data
        if self.open and self.open[-1] in ('h1', 'h2', 'h3'):
            self.headings[-1] += data

    def table(self, *headers):
        """The rows of the table that has these headers, as dicts."""
        found = [table for table in self.tables if set(headers) <= set(table[0])]
        assert len(found) == 1, headers
        first, *rows = found[0]
        return [dict(zip(first, row, strict=True)) for row in rows]


def page_of(folder, out=None):
    """The page about a run, which is checked to be whole and to need nothing else."""
    page = Page(write_run_page(folder, out))
    assert page.complaints == []
    assert len(page.ids) == len(set(page.ids))
    inside = {f'#{id}' for id in page.ids}
    assert {link for link in page.links if link not in inside} == {'data:,'}
    assert set(re.findall(r'url\((#[^)]*)\)', page.source)) <= inside
    assert '@import' not in page.source and 'url(http' not in page.source
    assert page.source.startswith('<!doctype html>\n<html lang="en">')
    assert "default-src 'none'" in page.source
    assert all(label.strip() for label in page.pictures)
    return page


AVERAGES = {
    'ema': {'update_freq': '1ba', 'half_life': '2ba', 'eval_labels': ['one'], 'save_weights': 'training'},
    'bema': {'update_freq': '2ba', 'eval_labels': ['two'], 'save_weights': 'average'},
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    settings = tiny_settings(folder) | {'algorithms': AVERAGES, 'save_folder': f'{folder}/run/checkpoints'}
    train(load_config(write_yaml(folder, settings), ['save_interval=2ba', 'eval_first=true', 'run_name=tiny']))
    return folder / 'run'


@pytest.fixture(scope='module')
def page(trained):
    return page_of(trained)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run, moved from where it was trained."""
    return shutil.copytree(trained, tmp_path / 'moved', symlinks=True)


def made(folder, lines, **settings):
    """A run's folder made by hand."""
    defaults = tiny_settings(folder) | {'run_name': 'made'}
    path = folder / 'run'
    write_settings(load_config(write_yaml(folder, defaults | settings)), path)
    text = ''.join(json.dumps(line) + '\n' if isinstance(line, dict) else line for line in lines)
    (path / 'metrics.jsonl').write_text(text)
    return path


def step(batch, **metrics):
    named = {name.replace('__', '/'): value for name, value in metrics.items()}
    return {'batch': batch, 'epoch': 0, 'token': 128 * batch, 'time/batch': batch, **named}


def test_a_real_run(trained, page):
    records = read_metrics(trained / 'metrics.jsonl')
    assert page.headings[:4] == ['tiny', 'Summary', 'Curves', 'Averages']
    assert page.headings[4:] == ['How much past weights weigh', 'Checkpoints', 'Settings', 'All metrics']
    assert page.notes[0] == 'The run has reached its end: 6ba.'
    curves = evaluation_curves(records)
    rows = {row['Evaluator']: row for row in page.table('Evaluator', 'perplexity')}
    assert {label: row['weights'] for label, row in rows.items()} == {'one': 'EMA', 'two': 'BEMA'}
    for label, points in curves.items():
        last, loss = points[-1]
        best, lowest = min(points, key=lambda point: point[1])
        assert list(rows[label].values())[2:] == [
            str(last), f'{loss:.4f}', f'{math.exp(loss):.3f}', f'{lowest:.4f}', str(best),
        ]  # fmt: skip
    values = page.table('step', 'one', 'two')
    assert [[row['one'], row['two']] for row in values] == [
        [f'{one:.4f}', f'{two:.4f}'] for (_, one), (_, two) in zip(curves['one'], curves['two'], strict=True)
    ]
    # 4 sequences of 32 tokens a step.
    assert page.facts['Steps done'] == '6'
    assert page.facts['Tokens seen'] == '768'


def test_the_averages_of_a_real_run(trained, page):
    last = {name: value for record in read_metrics(trained / 'metrics.jsonl') for name, value in record.items()}
    ema, bema = page.table('Average', 'updates', 'last beta')
    assert [ema['updates'], ema['last alpha'], ema['last beta']] == ['6', '–', f'{last["ema/beta"]:.6g}']
    assert [bema['updates'], bema['last alpha']] == ['3', f'{last["bema/alpha"]:.6g}']
    assert bema['last distance'] == f'{last["bema/distance"]:.6g}'
    ema, bema = page.table('Average', 'starts at step', 'start')
    # A half-life is two steps, and the run three half-lives long; the newest step of six weighs 1 - 2^(-1/2).
    assert [ema['start'], ema['newest'], ema['sum']] == ['0.1250', '0.2929', '1.0000']
    # With the defaults beta is (10 + t)^-0.5 and alpha (10 + t)^-0.2, at steps 2, 4 and 6.
    left = math.prod(1 - (10 + t) ** -0.5 for t in (2, 4, 6))
    assert bema['start'] == f'{left - 16**-0.2:.4f}'
    assert bema['newest'] == f'{16**-0.5 + 16**-0.2:.4f}'
    for title in ('Alpha', 'Beta', 'Distance', 'Weights in the EMA', 'Weights in the BEMA', 'Training loss'):
        assert any(f'Curves of {title}' in label for label in page.pictures), title


def test_a_weight_that_would_flatten_all_others_is_not_drawn(tmp_path):
    lines = [step(0), *(step(n, ema__num_updates=n, ema__beta=1 - 0.99) for n in (1, 2, 3))]
    page = page_of(made(tmp_path, lines, algorithms={'ema': {'smoothing': 0.99}}))
    # 0.99 to the power of 3, and 0.01 for the newest.
    assert page.text.count('Not drawn: ') == page.text.count('Not drawn: 0.9703 at step 0.') == 1
    (label,) = (label for label in page.pictures if 'Weights in the EMA' in label)
    assert 'EMA from 0.009801 at 1 to 0.01 at 3' in label


def test_ends_with_nothing_between_them_are_drawn(tmp_path):
    lines = [step(0), *(step(n, lawa__num_updates=n) for n in (1, 2, 3))]
    page = page_of(made(tmp_path, lines, algorithms={'lawa': {'update_freq': '1ba', 'window': 1}}))
    assert [label.partition(': ')[2] for label in page.pictures] == ['LAWA from 0 at 0 to 1 at 3.']
    assert 'Not drawn' not in page.text


def test_the_checkpoints_of_a_real_run(run):
    (run / 'checkpoints/ep0-ba4-rank0.pt').write_bytes(b'half of it')
    (run / 'checkpoints/ep0-ba5-rank0.pt.incomplete').write_bytes(b'')
    page = page_of(run)
    first, second, third = page.table('File', 'state')
    assert [first['step'], first["the model's weights"], first['state']] == ['2', 'BEMA', 'complete']
    assert first['averages'] == 'EMA, BEMA'
    assert second['state'].startswith('incomplete: ')
    assert third['state'] == 'complete'
    size = (run / 'checkpoints/ep0-ba6-rank0.pt').stat().st_size
    number, unit = third['size'].split()
    assert float(number) * {'kB': 1e3, 'MB': 1e6}[unit] == pytest.approx(size, rel=0.01)
    assert f'They are in {run}/checkpoints.' in page.notes
    assert 'A resumed run has set aside, as not whole: ep0-ba5-rank0.pt.incomplete.' in page.notes


def test_the_settings_of_a_run(page):
    for text in ('global_train_batch_size', 'name: decoupled_adamw', 'lr: 0.01', 'half_life: 2ba'):
        assert text in page.text
    assert re.search(r'\d+ settings at their defaults', page.text)


def test_nothing_there_is_said_to_be_there(tmp_path):
    page = page_of(made(tmp_path, [step(0), step(1, loss__train__total=2.5)], eval_loader=None))
    for note in (
        'The run has not reached its end: 1 of 6ba are done. It goes on, was stopped, or was killed.',
        'There are no evaluations in the metrics.',
        'The run keeps no average of its weights: all numbers are those of the training weights.',
        'The run saves no checkpoints: save_folder is not set.',
    ):
        assert note in page.notes
    # A single value is a picture too.
    (picture,) = page.pictures
    assert picture == 'Curves of Training loss over the optimizer step: training loss from 2.5 at 1 to 2.5 at 1.'


def test_a_run_that_has_logged_nothing_yet(tmp_path):
    page = page_of(made(tmp_path, ['{"batch": 0, "ep'], algorithms={'bema': {}}))
    assert page.notes[0] == 'Nothing has been logged yet.'
    assert any('is unfinished, as a killed run leaves it' in note for note in page.notes)
    assert 'BEMA has had no update yet: until its first one, evaluations see the training weights.' in page.notes
    assert 'There has been no update yet.' in page.text


def test_a_file_of_metrics_that_is_empty_is_not_cut(tmp_path):
    page = page_of(made(tmp_path, []))
    assert page.notes[0] == 'Nothing has been logged yet.'
    assert not any('unfinished' in note for note in page.notes)


def test_a_killed_and_resumed_run(tmp_path):
    lines = [step(0), step(1), step(2, metrics__one__LanguageCrossEntropy=3.0), step(3)]
    lines += [step(2, metrics__one__LanguageCrossEntropy=2.0), step(3), step(3), '{"batch": 4']
    page = page_of(made(tmp_path, lines, save_folder=str(tmp_path / 'none'), save_interval='1ba'))
    resumed = [re.match('The run was resumed at step (.), after step (.) ', note) for note in page.notes]
    assert [match.groups() for match in resumed if match] == [('2', '3'), ('3', '3')]
    assert any('is unfinished' in note for note in page.notes)
    (row,) = page.table('Evaluator', 'perplexity')
    assert [row['loss (nats per token)'], row['lowest loss']] == ['2.0000', '2.0000']
    assert f'There are no checkpoints in {tmp_path}/none.' in page.notes
    assert 'There is none of the steps 1, 2, at which one was due.' in page.notes


def test_a_branch_and_checkpoints_that_were_pruned_or_are_elsewhere(tmp_path):
    lines = [step(4), step(5, ema__num_updates=5, ema__beta=0.5), step(6, ema__num_updates=6, ema__beta=0.5)]
    settings = {'algorithms': {'ema': {'smoothing': 0.5}}, 'load_path': 'other/ep0-ba4-rank0.pt'}
    page = page_of(made(tmp_path, lines, **settings, save_folder='s3://bucket/run'))
    assert 'The metrics begin at step 4: the run went on from other/ep0-ba4-rank0.pt.' in page.notes
    assert 'The checkpoints are kept at s3://bucket/run, which is not on this machine.' in page.notes
    reason = 'some of its updates are not in these metrics, or were counted anew'
    assert f'What past steps weigh in the EMA cannot be told: {reason}.' in page.notes
    page = page_of(made(tmp_path, lines, save_folder=str(tmp_path / 'kept'), save_num_checkpoints_to_keep=2))
    assert 'Each start of the run keeps the last 2 that it saves (save_num_checkpoints_to_keep).' in page.notes


def test_a_run_on_preferences(tmp_path):
    metrics = {
        f'metrics/{label}/{name}': value
        for label in ('policy', 'bema')
        for name, value in {'PreferenceLoss': 0.625, 'RewardMargin': 0.5, 'RewardAccuracy': 0.75}.items()
    }
    lines = [
        step(1) | metrics | {'bema/num_updates': 1, 'bema/alpha': 11**-0.2, 'bema/beta': 11**-0.5},
        step(1, bema__num_ref_model_updates=1),
        step(2) | metrics | {'metrics/bema/PreferenceLoss': 0.5, 'bema/num_ref_model_updates': 2},
    ]
    bema = {'update_freq': '1ba', 'update_ref_model': True, 'eval_labels': ['bema']}
    page = page_of(made(tmp_path, lines, algorithms={'bema': bema}))
    policy, average = page.table('Evaluator', 'loss (preferences)')
    assert list(policy.values()) == ['policy', 'training', '2', '0.6250', '0.5000', '0.750', '0.6250', '1']
    assert list(average.values()) == ['bema', 'BEMA', '2', '0.5000', '0.5000', '0.750', '0.5000', '2']
    assert 'The reference model has become the BEMA weights 2 times, at steps 1, 2.' in page.notes
    silent = page_of(made(tmp_path, lines[:1], algorithms={'bema': bema}))
    assert 'The reference model has not become the BEMA weights yet.' in silent.notes


def test_other_metrics_have_columns_and_pictures_too(tmp_path):
    page = page_of(made(tmp_path, [step(1, metrics__one__Top1=0.5), step(2, metrics__two__Top1=0.25)]))
    assert page.table('Evaluator', 'Top1') == [
        {'Evaluator': 'one', 'weights': 'training', 'last step': '1', 'Top1': '0.5000'},
        {'Evaluator': 'two', 'weights': 'training', 'last step': '2', 'Top1': '0.2500'},
    ]
    assert len(page.pictures) == 1


def test_numbers_that_are_not_finite(tmp_path):
    name = 'metrics/one/LanguageCrossEntropy'
    lines = [step(1) | {name: 2.0}, step(2) | {name: 'nan'}, step(3) | {name: '-inf'}, step(4) | {name: 'inf'}]
    page = page_of(made(tmp_path, [*lines, step(5, loss__train__total='nan')]))
    (row,) = page.table('Evaluator', 'perplexity')
    assert [row['loss (nats per token)'], row['perplexity'], row['lowest loss']] == ['inf', 'inf', '-inf']
    assert [row['one'] for row in page.table('step', 'one')] == ['2.0000', 'nan', '-inf', 'inf']
    assert f'{name} is not finite at 3 of 4 steps, the first of which is 2.' in page.notes
    # What has no finite value has no picture.
    assert len(page.pictures) == 1


def test_what_a_run_is_called_is_no_markup(tmp_path):
    evil = '</title><script>alert("1")</script>&lt;'
    lines = [step(1) | {f'metrics/{evil}/LanguageCrossEntropy': 1.0, f'metrics/a/$_{evil}': 1.0, evil: 2.0}]
    run = made(tmp_path, lines, run_name=evil, variables={'x': evil}, save_folder=f'{tmp_path}/{evil}')
    page = page_of(run)
    assert page.headings[0] == evil
    assert page.text.count('<script>') >= 5
    assert '<script' not in page.source and '</title><' not in page.source


def test_a_curve_of_thousands_of_points_is_thinned(tmp_path):
    losses = [step(batch, loss__train__total=float(batch % 2)) for batch in range(5000)]
    path = write_run_page(made(tmp_path, losses, max_duration='5000ba'))
    assert 'A point is the mean of 9 in a row; the first and the last are single ones.' in path.read_text()
    assert path.stat().st_size < 100_000


def test_algorithms_that_are_no_averages_are_left_alone(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError('it is built')

    monkeypatch.setattr('composer.algorithms.GradientClipping.__init__', refuse)
    algorithms = {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}, 'ema': {}}
    page = page_of(made(tmp_path, [step(0)], algorithms=algorithms))
    assert [row['Average'] for row in page.table('Average', 'updates', 'last beta')] == ['EMA']


def test_a_page_takes_the_place_of_an_older_one_and_leaves_nothing_else(run, tmp_path):
    out = tmp_path / 'page.html'
    out.write_text('an older page')
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    assert write_run_page(run, out) == out
    assert out.read_text().startswith('<!doctype html>')
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['moved', 'page.html']
    assert write_run_page(run).read_text() == out.read_text()


def damaged(run, name, text):
    (run / name).write_text(text)
    return run


@pytest.mark.parametrize(
    ('damage', 'error', 'sentence'),
    [
        (lambda run: run / 'none', FileNotFoundError, "No such folder of a run: '.*none'"),
        (lambda run: run / 'metrics.jsonl', FileNotFoundError, "No such folder of a run: '.*metrics.jsonl'"),
        (lambda run: run.parent, FileNotFoundError, 'is no folder of a run: there is no config.yaml in it'),
        (lambda run: damaged(run, 'config.yaml', 'a: ['), ConfigError, 'are damaged: .* is not valid YAML'),
        (lambda run: damaged(run, 'config.yaml', 'a: 1'), ConfigError, 'are damaged: a is not a setting'),
        (lambda run: damaged(run, 'metrics.jsonl', '{"batch": 1}\n{"ba\n{"batch": 2}\n'), ValueError, 'Line 2 of'),
        (lambda run: damaged(run, 'metrics.jsonl', '{"batch": 1}\n[1]\n'), ValueError, 'Line 2 of .* is damaged'),
    ],
    ids=['none', 'file', 'other folder', 'no YAML', 'no settings', 'cut line', 'no object'],
)
def test_what_is_no_run_is_refused(tmp_path, damage, error, sentence):
    target = damage(made(tmp_path, [step(0)]))
    with pytest.raises(error, match=sentence):
        write_run_page(target)
    assert not list(tmp_path.rglob('*report.html'))


def test_a_folder_without_metrics_is_refused(tmp_path):
    run = made(tmp_path, [])
    (run / 'metrics.jsonl').unlink()
    with pytest.raises(FileNotFoundError, match=r'has no metrics\.jsonl: its run has logged nothing'):
        write_run_page(run)


@pytest.mark.parametrize('setting', ['max_duration: 6 weeks', 'save_interval: often', 'algorithms: {bema: {lag: x}}'])
def test_settings_that_were_damaged_by_hand_are_named(tmp_path, setting):
    run = made(tmp_path, [step(0)])
    key = setting.partition(':')[0]
    lines = [line for line in (run / 'config.yaml').read_text().splitlines() if not line.startswith(f'{key}:')]
    (run / 'config.yaml').write_text('\n'.join([*lines, setting]))
    with pytest.raises(ConfigError, match=f'The settings of the run in .* are damaged: {key}'):
        write_run_page(run)


def test_a_page_is_not_written_where_it_cannot_or_must_not_be(tmp_path):
    run = made(tmp_path, [step(0)])
    with pytest.raises(FileNotFoundError, match="There is no folder '.*none' for the page"):
        write_run_page(run, tmp_path / 'none/page.html')
    with pytest.raises(ValueError, match='is a folder: name a file for the page'):
        write_run_page(run, tmp_path)
    with pytest.raises(ValueError, match='is a file of the run: name another one'):
        write_run_page(run, tmp_path / 'run/../run/metrics.jsonl')
    assert read_metrics(run / 'metrics.jsonl') == [step(0)]
