# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The page on cooldowns, in a minute: its commands one after the other, over a run of forty steps."""

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks.studies import ROOT, run_study


def study(*arguments: str, cwd: Path) -> str:
    return run_study('cooldowns.py', *arguments, cwd=cwd)


def test_the_page_prints_the_commands_that_are_run():
    page = (ROOT / 'docs' / 'cooldowns.md').read_text()
    (block,) = re.findall(r'```console\n(.*?)```', page, flags=re.DOTALL)
    assert study('--dry-run', cwd=ROOT) == block


@pytest.mark.slow
def test_the_study_runs_and_leaves_its_tables_and_pictures(tmp_path):
    (tmp_path / 'yamls').symlink_to(ROOT / 'yamls')
    output = study('--steps', '40', cwd=tmp_path)
    rows = json.loads((tmp_path / 'runs/cooldowns/results.json').read_text())
    assert [(row['start'], row['end']) for row in rows] == [(16, 20), (24, 30), (32, 40)]
    for row in rows:
        # What 256 bytes that are equally likely would have is 5.5.
        losses = {name: value for name, value in row.items() if name not in ('start', 'end', 'shares')}
        assert len(losses) == 8 and all(1 < loss < 6 for loss in losses.values())
        assert len(set(losses.values())) == 8
        assert f'{row["cooldown"]:.4f}' in output
    for picture in ('tokens.png', 'flops.png'):
        assert (tmp_path / 'runs/cooldowns' / picture).read_bytes().startswith(b'\x89PNG')
    # The commands can be run again, and replace what was there.
    assert sorted(path.name for path in (tmp_path / 'runs').iterdir()) == [
        'constant_rate',
        'constant_rate-cooldown-16ba-20ba-1-sqrt',
        'constant_rate-cooldown-24ba-30ba-1-sqrt',
        'constant_rate-cooldown-32ba-40ba-1-sqrt',
        'constant_rate-merges',
        'cooldowns',
    ]
