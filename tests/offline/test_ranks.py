# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Several processes at one average: they write what one alone would write, and fail together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from composer_bema.formats.unpickling import load_archive
from composer_bema.offline.ranks import (
    all_succeed,
    from_first_rank,
    is_first_rank,
    joined,
    leave_process_group,
    share_out,
    union,
)
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize
from tests.distributed.ranks import run_ranks
from tests.offline.runs import as_huggingface, as_safetensors, run

BEMA = Setting('bema', update_freq=2)
LATER = Setting('bema', update_freq=2, update_after=2)


def contents(folder: Path) -> dict[str, object]:
    """The files by their names; of what torch has pickled the values, for equal ones can be pickled in two ways."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob('*') if path.is_file()}
    return {name: unpickled(path) if path.suffix == '.pt' else path.read_bytes() for name, path in files.items()}


def unpickled(path: Path) -> object:
    state = load_archive(path)['state']
    model = {name: (tensor.dtype, tensor.tolist()) for name, tensor in state.pop('model').items()}
    return {**state, 'model': model}


def attempts(calls: list[dict]) -> list[str]:
    """Averages again and again, and returns what was raised each time; a list of values holds one for each rank."""
    raised = []
    with joined():
        for call in calls:
            mine = {key: value[dist.get_rank()] if isinstance(value, list) else value for key, value in call.items()}
            try:
                stabilize(**mine)
            except Exception as error:
                raised.append(f'{type(error).__name__}: {error}')
            else:
                # Nobody goes on before it is there.
                raised.append('' if Path(mine['out']).exists() else 'there is nothing')
    return raised


def stabilize_and_fail(function: str, rank: int, call: dict) -> str:
    """Averages, with a function that fails on one rank."""
    with joined():
        fails = mock.patch(function, side_effect=OSError('the disk is full'))
        with fails if dist.get_rank() == rank else mock.MagicMock(), pytest.raises((OSError, ValueError)) as error:
            stabilize(**call)
    return str(error.value)


def with_nan(checkpoints: Path) -> Path:
    """Puts a NaN into a tensor of one checkpoint, which is read by one rank alone."""
    path = checkpoints / 'model-6.safetensors'
    tensors = load_file(path)
    tensors['model.model.norm.weight'][3] = torch.nan
    save_file(tensors, path)
    return checkpoints


def test_leaving_a_group_does_not_wait_for_its_own_lock(tmp_path):
    """Without care a group hangs here after some ten rounds."""
    for index in range(100):
        dist.init_process_group('gloo', init_method=f'file://{tmp_path / str(index)}', rank=0, world_size=1)
        assert from_first_rank(index) == index
        leave_process_group()
    assert not dist.is_initialized()


@pytest.mark.parametrize('world_size', [2, 3])
def test_ranks_write_what_one_process_writes_and_fail_together(tmp_path, world_size):
    source = run('average')
    good = {
        'huggingface': {'checkpoints': as_huggingface(source, tmp_path / 'folders'), 'max_shard_size': '8KB'},
        'two steps': {'checkpoints': tmp_path / 'folders', 'at': (6, 12)},
        'composer': {'checkpoints': source.checkpoints},
        'composer as it is': {'checkpoints': source.checkpoints, 'format': 'composer', 'dtype': 'bfloat16'},
    }
    good = {name: {'setting': BEMA, 'initial_model': source.initial_model, **call} for name, call in good.items()}
    good['statistics'] = {'checkpoints': run('classifier').checkpoints, 'setting': LATER}
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'file').touch()
    bad = {
        'NaN': {'checkpoints': with_nan(as_safetensors(source, tmp_path / 'bad'))},
        'taken': {'checkpoints': source.checkpoints},
        # Other ranks may be on other machines.
        'nowhere': {'checkpoints': [source.checkpoints] * (world_size - 1) + [tmp_path / 'nowhere']},
    }
    wrong = [{'setting': LATER, 'out': tmp_path / name, **call} for name, call in bad.items()]
    right = [{'out': tmp_path / 'together' / name, **call} for name, call in good.items()]

    by_rank = run_ranks(attempts, world_size, [*wrong, *right], timeout=60)

    for raised in by_rank:
        assert "'model.model.norm.weight' in" in raised[0] and 'holds a NaN' in raised[0]
        assert "taken' exists and is not an empty folder" in raised[1]
        assert 'No such directory of checkpoints' in raised[2]
        assert raised[3:] == [''] * len(right)
    assert {path.name for path in tmp_path.iterdir()} == {'folders', 'bad', 'taken', 'together'}
    assert {path.name for path in (tmp_path / 'together').iterdir()} == set(good)
    for name, call in good.items():
        stabilize(out=tmp_path / 'alone' / name, **call)
    assert contents(tmp_path / 'together') == contents(tmp_path / 'alone')


def test_ranks_agree_on_the_checkpoints(tmp_path):
    """Of a directory that a run is still writing to, all take what the first one has seen."""
    source = run('average')
    as_safetensors(source, tmp_path / 'all')
    shutil.copytree(tmp_path / 'all', tmp_path / 'fewer')
    (tmp_path / 'fewer' / 'model-12.safetensors').unlink()
    call = {'setting': LATER, 'checkpoints': [tmp_path / 'fewer', tmp_path / 'all'], 'out': tmp_path / 'together'}
    assert run_ranks(attempts, 2, [call], timeout=60) == [[''], ['']]
    stabilize(tmp_path / 'fewer', tmp_path / 'alone', LATER)
    assert contents(tmp_path / 'together') == contents(tmp_path / 'alone')


@pytest.mark.parametrize(
    ('function', 'rank'),
    [
        ('composer_bema.offline.trajectory.open_sources', 1),
        ('composer_bema.formats.safetensors_files.SafetensorsFiles.create', 0),
        ('composer_bema.formats.safetensors_files.SafetensorsFiles.write', 1),
        ('composer_bema.offline.stabilize.write_manifest', 0),
        ('pathlib.Path.rename', 0),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(tmp_path, function, rank):
    checkpoints = as_safetensors(run('average'), tmp_path / 'in')
    call = {'checkpoints': checkpoints, 'out': tmp_path / 'out', 'setting': LATER}
    assert run_ranks(stabilize_and_fail, 2, function, rank, call, timeout=60) == ['the disk is full'] * 2
    assert list(tmp_path.iterdir()) == [checkpoints]


def test_ranks_write_the_adapter_that_one_process_writes(tmp_path):
    call = {'checkpoints': run('lora').checkpoints, 'setting': LATER}
    assert run_ranks(attempts, 2, [{'out': tmp_path / 'together', **call}], timeout=60) == [[''], ['']]
    stabilize(out=tmp_path / 'alone', **call)
    together, alone = (contents(tmp_path / name) for name in ('together', 'alone'))
    # PEFT lists modules in the order of a set, which is another in every process.
    assert together.pop('adapter_config.json')
    assert alone.pop('adapter_config.json')
    assert together == alone


@pytest.mark.parametrize('sizes', [[5, 5, 5, 5], [9, 1, 1, 1, 1, 1, 1, 1, 1, 1], [7, 6, 5, 4, 3, 2, 1], [1], []])
def test_share_out_balances(sizes):
    """Every item has one rank, and no load is above another by more than one item."""

    def share_of(rank: int) -> list[int]:
        with mock.patch.multiple(dist, **{name: lambda value=value: value for name, value in group(rank).items()}):
            return share_out(list(range(len(sizes))), sizes)

    def group(rank: int) -> dict[str, object]:
        return {'is_initialized': True, 'get_world_size': 3, 'get_rank': rank}

    shares = [share_of(rank) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_one_process_alone_needs_no_group():
    with joined(), all_succeed():
        assert is_first_rank()
        assert share_out(['a', 'b'], [1, 2]) == ['a', 'b']
        assert from_first_rank('a') == 'a'
        assert union({'a': 1}) == {'a': 1}
    with pytest.raises(KeyError, match='b'), all_succeed():
        raise KeyError('b')


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [*command, '-m', 'composer_bema', *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    source = run('average')
    options = ['--rule', 'bema', '--update-freq', '2', '--initial-model', source.initial_model, '--out']
    result = torchrun('stabilize', str(source.checkpoints), *options, str(tmp_path / 'together'), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"Wrote bema update_freq=2 to '{tmp_path / 'together'}'.\n"
    assert result.stderr.count('Reading') == 1
    stabilize(source.checkpoints, tmp_path / 'alone', BEMA, initial_model=source.initial_model)
    assert contents(tmp_path / 'together') == contents(tmp_path / 'alone')

    again = torchrun('stabilize', str(source.checkpoints), *options, str(tmp_path / 'together'), folder=tmp_path)
    assert again.returncode != 0
    # Each rank says so at its end, and the one that has seen it at once.
    assert again.stderr.count('exists and is not an empty folder') == 3
    assert again.stderr.count('ERROR: Rank 0: ') == 1
    assert 'most recent call last' not in again.stderr.partition('torch/distributed')[0]
