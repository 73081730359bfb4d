# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of killed runs: which are whole, which is the newest of these, and what becomes of the others."""

import logging
import os
import shutil

import pytest
import torch

from composer_bema.formats.completeness import newest_complete_checkpoint, saved_checkpoints, why_incomplete
from composer_bema.formats.unpickling import archive_problem
from tests.distributed.programs import Topology
from tests.distributed.ranks import run_ranks
from tests.formats.runs import save_run, saved, saved_in_parts


@pytest.fixture
def folder(tmp_path):
    """A save_folder of three checkpoints, and the link that Composer leaves."""
    folder = tmp_path / 'run' / 'checkpoints'
    folder.mkdir(parents=True)
    for name in ('ep0-ba8', 'ep0-ba16', 'ep1-ba100'):
        shutil.copy(saved('none').path, folder / f'{name}-rank0.pt')
    os.symlink('ep1-ba100-rank0.pt', folder / 'latest-rank0.pt')
    return folder


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / 'sharded'
    for name in ('ep0-ba8', 'ep0-ba16'):
        shutil.copytree(saved_in_parts('none').path, folder / name)
    os.symlink('ep0-ba16', folder / 'latest-rank0.pt')
    return folder


def cut(path, length=None):
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size - 1 if length is None else length)


def test_whole_checkpoints_are_whole():
    assert why_incomplete(saved('two averages').path) == ''
    assert why_incomplete(saved_in_parts('two averages').path) == ''


@pytest.mark.parametrize('part', range(10))
def test_a_file_that_is_cut_off_is_not_whole(folder, part):
    path = folder / 'ep0-ba8-rank0.pt'
    cut(path, path.stat().st_size * part // 10)
    assert why_incomplete(path) == 'its end is missing, or it is another kind of file'


def test_a_file_whose_pickle_is_damaged_is_not_whole(folder):
    path = folder / 'ep0-ba8-rank0.pt'
    content = path.read_bytes()
    assert content.count(b'CheckpointSaver') == 1
    path.write_bytes(content.replace(b'CheckpointSaver', b'CheckpointWaver'))
    assert why_incomplete(path).startswith('its records are damaged: Bad CRC-32')


def test_sharded_checkpoints_that_are_not_whole(sharded):
    path = sharded / 'ep0-ba8'
    (shard,) = path.glob('*.distcp')
    cut(shard)
    assert why_incomplete(path) == f"its file '{shard.name}' is cut off"
    shard.unlink()
    assert why_incomplete(path) == f"its file '{shard.name}' is missing"
    cut(path / '.metadata')
    assert why_incomplete(path).startswith('its .metadata cannot be unpickled')
    (path / '.metadata').unlink()
    assert why_incomplete(path) == "it has no '.metadata'"


def test_the_newest_by_steps(folder):
    """The names are not in the order of the alphabet."""
    assert sorted(saved_checkpoints(folder)) == [
        (8, 0, folder / 'ep0-ba8-rank0.pt'),
        (16, 0, folder / 'ep0-ba16-rank0.pt'),
        (100, 1, folder / 'ep1-ba100-rank0.pt'),
    ]
    assert newest_complete_checkpoint(folder) == str(folder / 'ep1-ba100-rank0.pt')


def test_run_name_and_rank_in_the_folder(folder):
    found = newest_complete_checkpoint(folder.parents[1] / '{run_name}/checkpoints', 'run')
    assert found == str(folder / 'ep1-ba100-rank0.pt')
    folder.rename(folder.with_name('rank0'))
    assert newest_complete_checkpoint(str(folder.with_name('rank{rank}'))) is not None


def test_an_unfinished_one_is_passed_over_and_left_alone(folder, caplog):
    cut(folder / 'ep1-ba100-rank0.pt')
    before = sorted(folder.iterdir())
    assert newest_complete_checkpoint(folder) == str(folder / 'ep0-ba16-rank0.pt')
    assert sorted(folder.iterdir()) == before
    (message,) = caplog.messages
    assert 'ep1-ba100-rank0.pt' in message
    assert message.endswith('and is passed over.')


def test_newer_unfinished_ones_are_set_aside(folder, caplog):
    cut(folder / 'ep0-ba8-rank0.pt')
    cut(folder / 'ep0-ba16-rank0.pt', 0)
    (folder / 'ep1-ba100-rank0.pt').unlink()
    shutil.copy(saved('none').path, folder / 'ep0-ba4-rank0.pt')
    (folder / 'ep0-ba16-rank0.pt.incomplete').touch()
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(folder, set_aside=True) == str(folder / 'ep0-ba4-rank0.pt')
    assert sorted(path.name for path in folder.iterdir()) == [
        'ep0-ba16-rank0.pt.2.incomplete',
        'ep0-ba16-rank0.pt.incomplete',
        'ep0-ba4-rank0.pt',
        'ep0-ba8-rank0.pt.incomplete',
        'latest-rank0.pt',
    ]
    assert len(caplog.messages) == 2
    assert all('not whole (its end is missing' in message for message in caplog.messages)
    assert newest_complete_checkpoint(folder, set_aside=True) == str(folder / 'ep0-ba4-rank0.pt')


def test_older_unfinished_ones_stay(folder):
    cut(folder / 'ep0-ba8-rank0.pt')
    assert newest_complete_checkpoint(folder, set_aside=True) == str(folder / 'ep1-ba100-rank0.pt')
    assert (folder / 'ep0-ba8-rank0.pt').exists()


def test_sharded_checkpoints(sharded):
    assert newest_complete_checkpoint(sharded) == str(sharded / 'ep0-ba16')
    (sharded / 'ep0-ba16' / '.metadata').unlink()
    assert newest_complete_checkpoint(sharded, set_aside=True) == str(sharded / 'ep0-ba8')
    assert (sharded / 'ep0-ba16.incomplete').is_dir()


def test_where_there_is_none(tmp_path):
    assert newest_complete_checkpoint(tmp_path / 'nothing') is None
    for name in (
        'ep0-ba1-rank1.pt',
        'ep0-ba1.pt',
        'xep0-ba1-rank0.pt',
        'latest-rank0.pt',
        'ep0-ba1-rank0.pt.incomplete',
    ):
        shutil.copy(saved('none').path, tmp_path / name)
    (tmp_path / 'ep0-ba2-rank0.pt').mkdir()
    (tmp_path / 'ep0-ba3').touch()
    os.symlink('ep0-ba1.pt', tmp_path / 'ep0-ba4-rank0.pt')
    assert newest_complete_checkpoint(tmp_path) is None


@pytest.mark.slow
def test_a_sharded_run_is_resumed_from_the_newest_whole_checkpoint(tmp_path):
    folder, topology = tmp_path / 'checkpoints', Topology(2, 'fsdp2')
    expected, _ = run_ranks(save_run, 2, str(folder), topology)
    (folder / 'ep0-ba4' / '.metadata').unlink()
    found = newest_complete_checkpoint(folder, set_aside=True)
    assert found == str(folder / 'ep0-ba2')
    resumed, _ = run_ranks(save_run, 2, str(folder), topology, load_path=found)
    assert newest_complete_checkpoint(folder) == str(folder / 'ep0-ba4')
    for which in ('training', 'BEMA'):
        for name, tensor in expected[which].items():
            assert torch.equal(resumed[which][name], tensor), name


def test_a_checkpoint_that_another_rank_sets_aside_meanwhile_is_passed_over(folder, monkeypatch):
    def problem(path):
        if 'ba100' in path.name:
            path.rename(path.with_suffix('.incomplete'))
        return archive_problem(path)

    monkeypatch.setattr('composer_bema.formats.completeness.archive_problem', problem)
    assert newest_complete_checkpoint(folder) == str(folder / 'ep0-ba16-rank0.pt')
