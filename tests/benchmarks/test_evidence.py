# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The studies of the page on evidence, each in less than a minute: fewer steps, fewer seeds."""

import pytest

from benchmarks.over_seeds import read_lines
from tests.benchmarks.studies import ROOT, run_study


@pytest.mark.slow
def test_the_study_of_a_language_model_chooses_on_one_text_and_reports_on_another(tmp_path):
    (tmp_path / 'yamls').symlink_to(ROOT / 'yamls')
    few = 'averages=[{rule: ema, half_life: [5, 500]}, {rule: bema, half_life: [5, 500], bias_power: 0.4}]'
    arguments = ('--regime', 'lower-rate', '--steps', '20', '--seeds', '1', few)
    output = run_study('evidence_language_model.py', *arguments, cwd=tmp_path)
    out = tmp_path / 'runs/evidence/language-model'
    text = {
        part: {row['text'] for row in read_lines(out / f'text/{part}.jsonl')}
        for part in ('train', 'validation', 'test')
    }
    assert all(text.values())
    assert not text['test'] & (text['train'] | text['validation']) and not text['validation'] & text['train']
    tuning = read_lines(out / 'tuning.jsonl')
    # Two settings of each method at three lengths.
    assert len(tuning) == 12 and {row['step'] for row in tuning} == {5, 10, 20}
    records = read_lines(out / 'results.jsonl')
    assert [record['step'] for record in records] == [5, 10, 15, 20]
    assert {record['seed'] for record in records} == {1}
    # What 256 bytes that are equally likely would have is 5.5.
    assert all(1 < record[method] < 5.5 for record in records for method in ('training', 'ema', 'bema'))
    assert records[-1]['ema - bema'] == records[-1]['ema'] - records[-1]['bema']
    assert [record['step'] for record in read_lines(out / 'shorter.jsonl')] == [5, 10]
    assert (out / 'tables.md').read_text() in output
    assert (out / 'losses.png').read_bytes().startswith(b'\x89PNG')
    # Checkpoints are large, and are not kept.
    assert not list(out.rglob('*.pt'))


@pytest.mark.slow
def test_the_study_of_digits_compares_averages_of_one_run(tmp_path):
    pytest.importorskip('sklearn')
    output = run_study('evidence_digits.py', '--steps', '20', '--seeds', '1', cwd=tmp_path)
    out = tmp_path / 'runs/evidence/digits'
    records = read_lines(out / 'results.jsonl')
    at_end = {
        (record['rate'], record['statistics'], record['measure']): record for record in records if record['step'] == 20
    }
    assert len(at_end) == 8
    for rate in (0.01, 0.1):
        averaged, copied = (at_end[rate, statistics, 'loss'] for statistics in ('averaged', 'copied'))
        # What is averaged beside a run does not change it.
        assert averaged['training'] == copied['training']
        assert averaged['ema'] != copied['ema'] and averaged['ema'] != averaged['bema'] != averaged['training']
    # Seventy-two settings, at each rate with statistics averaged and copied.
    assert len(read_lines(out / 'tuning.jsonl')) == 4 * 72
    assert len(read_lines(out / 'recomputed.jsonl')) == 8
    assert (out / 'tables.md').read_text() in output
    assert (out / 'curves.png').read_bytes().startswith(b'\x89PNG')
