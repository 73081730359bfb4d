# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averages whose process is killed: nothing half-written has the final name, and the next attempt succeeds."""

import functools
import os
import pkgutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from composer_bema.formats.huggingface import new_folder
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize
from tests.distributed.ranks import Ranks, start_ranks
from tests.offline.runs import as_safetensors, run

BEMA = Setting('bema', update_freq=2, update_after=2)
FILES = 'composer_bema.formats.safetensors_files:SafetensorsFiles'
# What is called, and at which call the process ends, which is before anything comes of it.
MOMENTS = [
    ('composer_bema.offline.stabilize:weights_writer', 1),
    (f'{FILES}.create', 1),
    (f'{FILES}.write', 1),
    (f'{FILES}.write', 12),
    ('composer_bema.offline.stabilize:write_manifest', 1),
    ('pathlib:Path.chmod', 2),
    ('pathlib:Path.rename', 1),
    # With the folder in place, and the temporary one still there.
    ('tempfile:TemporaryDirectory.cleanup', 1),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def interrupted(function: str, call: int, interrupt: Callable[[], None]) -> Any:
    """Has something happen before a function is called for the n-th time."""
    original = pkgutil.resolve_name(function)
    calls = iter(range(1, 10**6))

    @functools.wraps(original)
    def count_and_call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            interrupt()
        return original(*args, **kwargs)

    return mock.patch(function.replace(':', '.'), count_and_call)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(path: Path) -> None:
    path.with_name('waits').touch()
    while not path.exists():
        time.sleep(0.002)


def average_and_die(function: str, call: int, checkpoints: Path, out: Path) -> None:
    with interrupted(function, call, die):
        stabilize(checkpoints, out, BEMA)


def average_and_wait(go: Path, checkpoints: Path, out: Path) -> str:
    """Stops in the middle until it is told to go on, and returns what is raised."""
    with interrupted(f'{FILES}.write', 5, lambda: wait_for(go)), pytest.raises(OSError) as error:
        stabilize(checkpoints, out, BEMA)
    return str(error.value)


def replace_and_die(folder: Path) -> None:
    with interrupted('pathlib:Path.rename', 2, die), new_folder(folder, replace=True) as unfinished:
        (unfinished / 'file').write_text('new')


def ended(ranks: Ranks) -> list[int | None]:
    while None in ranks.exit_codes:
        time.sleep(0.005)
    return ranks.exit_codes


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    return as_safetensors(run('average'), tmp_path_factory.mktemp('kill') / 'in')


@pytest.fixture(scope='module')
def expected(checkpoints, tmp_path_factory):
    (folder,) = stabilize(checkpoints, tmp_path_factory.mktemp('kill') / 'out', BEMA)
    return contents(folder)


@pytest.mark.parametrize(('function', 'call'), MOMENTS)
def test_a_killed_process_leaves_nothing_half_written(tmp_path, checkpoints, expected, function, call):
    out = tmp_path / 'out'
    with start_ranks(average_and_die, 1, function, call, checkpoints, out) as ranks:
        assert ended(ranks) == [-signal.SIGKILL]
    (left,) = tmp_path.glob('.*')
    assert left.name.startswith('.out-unfinished-')
    if out.exists():
        assert contents(out) == expected
        with pytest.raises(FileExistsError, match='exists and is not an empty folder'):
            stabilize(checkpoints, out, BEMA)
    else:
        stabilize(checkpoints, out, BEMA)
    assert contents(out) == expected
    assert list(tmp_path.iterdir()) == [out]


def test_a_live_process_keeps_its_folder(tmp_path, checkpoints, expected):
    """Of two that make the same folder, the first to finish wins; neither touches what the other is writing."""
    out, signals = tmp_path / 'a' / 'out', tmp_path / 'signals'
    signals.mkdir()
    with start_ranks(average_and_wait, 1, signals / 'go', checkpoints, out) as ranks:
        while not (signals / 'waits').exists():
            assert ranks.exit_codes == [None], ranks.results()
            time.sleep(0.005)
        (theirs,) = out.parent.iterdir()
        stabilize(checkpoints, out, BEMA)
        assert set(out.parent.iterdir()) == {out, theirs}
        (signals / 'go').touch()
        assert ranks.results()[0].startswith('[Errno 39] Directory not empty')
    assert contents(out) == expected
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize('replace', [True, False])
def test_a_folder_that_was_to_be_replaced_comes_back(tmp_path, replace):
    """Killed between the removal of the old folder and the coming of the new one."""
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'file').write_text('old')
    with start_ranks(replace_and_die, 1, folder) as ranks:
        assert ended(ranks) == [-signal.SIGKILL]
    assert not folder.exists()

    expected_error = KeyError if replace else FileExistsError
    with pytest.raises(expected_error), new_folder(folder, replace=replace):
        assert (folder / 'file').read_text() == 'old'
        raise KeyError('the next attempt fails too')
    assert (folder / 'file').read_text() == 'old'
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'file').write_text('old')

    def fail() -> None:
        raise OSError('no')

    with (
        pytest.raises(OSError, match='^no$'),
        interrupted('pathlib:Path.rename', 2, fail),
        new_folder(folder, replace=True) as unfinished,
    ):
        (unfinished / 'file').write_text('new')
    assert (folder / 'file').read_text() == 'old'
    assert list(tmp_path.iterdir()) == [folder]
