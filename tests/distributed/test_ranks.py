# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A test with several ranks ends in any case, says what happened, and leaves nothing running."""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from composer.utils import checkpoint, dist

from tests.distributed.ranks import run_ranks, start_ranks

LAUNCHER = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def describe(*args: int, **kwargs: int) -> tuple:
    return dist.get_global_rank(), dist.get_world_size(), args, kwargs


def environment() -> dict[str, object]:
    return {
        'launcher': [name for name in LAUNCHER if name in os.environ],
        'initialized': dist.is_initialized(),
        'offline': os.environ['HF_HUB_OFFLINE'],
        'imported before': 'tests.distributed.programs' in sys.modules,
        'shard': checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME,
    }


def add_ranks() -> torch.Tensor:
    dist.initialize_dist('cpu')
    total = torch.tensor([dist.get_global_rank()])
    dist.all_reduce(total)
    return total


def fail(rank: int, how: str) -> None:
    """The rank fails, and the other one waits for it in a collective."""
    dist.initialize_dist('cpu')
    if dist.get_global_rank() == rank:
        print('the last words')
        if how == 'raise':
            raise KeyError('the reason')
        if how == 'crash':
            faulthandler._sigsegv()  # type: ignore
        if how == 'die':
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    dist.barrier()


def wait_after_saying_so(folder: Path) -> None:
    (folder / str(dist.get_global_rank())).touch()
    time.sleep(600)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_are_in_the_order_of_the_ranks() -> None:
    assert run_ranks(describe, 3, 5, extra=7) == [(rank, 3, (5,), {'extra': 7}) for rank in range(3)]


def test_ranks_talk_to_each_other() -> None:
    assert run_ranks(add_ranks, 3) == [torch.tensor([3])] * 3


def test_one_rank_is_a_plain_script() -> None:
    (seen,) = run_ranks(environment, 1)
    assert seen['launcher'] == []
    assert not seen['initialized']


def test_several_ranks_have_what_a_launcher_gives() -> None:
    seen = run_ranks(environment, 2)
    assert [rank['launcher'] for rank in seen] == [list(LAUNCHER)] * 2
    assert [rank['shard'] for rank in seen] == ['__0_0.distcp', '__1_0.distcp']


def test_ranks_have_the_environment_of_the_tests_and_its_imports() -> None:
    (seen,) = run_ranks(environment, 1)
    assert (seen['offline'], seen['imported before']) == ('1', True)


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize(
    ('how', 'reports'),
    [
        ('raise', ['raised', 'in fail', "KeyError: 'the reason'"]),
        ('die', ['exit code -9 (SIGKILL)']),
        ('crash', ['exit code -11 (SIGSEGV)', 'the last words', 'Fatal Python error: Segmentation fault', 'in fail']),
        ('hang', ['exit code 1 and no result', 'the last words', 'Timeout', 'in fail']),
    ],
)
def test_a_rank_that_fails_is_reported_and_the_other_does_not_wait_for_it(
    rank: int, how: str, reports: list[str]
) -> None:
    with start_ranks(fail, 2, rank, how, timeout=3 if how == 'hang' else 60) as ranks:
        pids = ranks.pids
        with pytest.raises(AssertionError) as error:
            ranks.results()
        assert not any(is_running(pid) for pid in pids)
    message = str(error.value)
    if how != 'hang':
        assert message.startswith(f'Rank {rank} of 2 ')
    for report in reports:
        assert report in message


def test_a_run_is_killed_on_all_ranks_at_once(tmp_path: Path) -> None:
    with start_ranks(wait_after_saying_so, 2, tmp_path) as ranks:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        assert ranks.exit_codes == [None, None]
        assert ranks.kill() == [-signal.SIGKILL] * 2
        assert not any(is_running(pid) for pid in ranks.pids)
        with pytest.raises(AssertionError, match='Rank 0 of 2 ended with exit code -9'):
            ranks.results()


def test_nothing_runs_on_after_the_with_statement(tmp_path: Path) -> None:
    with start_ranks(wait_after_saying_so, 2, tmp_path) as ranks:
        pids = ranks.pids
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)
