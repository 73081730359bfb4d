# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Runs of several ranks: one process each, forked from a server that imports Composer once for the whole session."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ['Ranks', 'run_ranks', 'start_ranks', 'start_server']

TIMEOUT = 120.0
# How long the others get to fail as well, or to say where they wait, when one rank has failed.
GRACE = 1.0

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(
    ['composer', 'torch', 'torch.distributed.fsdp', 'composer_bema.algorithms', 'tests.distributed.programs']
)


class Ranks:
    """Processes that run one function, one rank each; a context manager that leaves none of them running.

    Args:
        function (Callable): What every rank runs; it and its arguments are pickled, so it is found by its name.
        world_size (int): The number of ranks. One rank is a plain ``python script.py``, without a launcher's
            environment.
        args (tuple): The positional arguments of the function.
        kwargs (dict): Its keyword arguments.
        timeout (float): The seconds after which a rank that is still running prints where it is, and ends.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        world_size: int,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.world_size = world_size
        self._timeout = timeout
        self._temporary = tempfile.TemporaryDirectory(prefix='ranks-')
        self._folder = Path(self._temporary.name)
        # Bound but not listening, the port stays reserved until rank 0 listens there.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(('127.0.0.1', 0))
        call = pickle.dumps((function, args, kwargs or {}))
        port = self._port.getsockname()[1]
        self._processes = [
            _context.Process(target=_run_rank, args=(rank, world_size, port, self._folder, call, timeout))
            for rank in range(world_size)
        ]
        start_server()
        try:
            for process in self._processes:
                process.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def exit_codes(self) -> list[int | None]:
        """By rank, as ``subprocess`` has them: None while it runs, -9 after SIGKILL."""
        return [process.exitcode for process in self._processes]

    def output(self, rank: int) -> str:
        """Returns what a rank has printed so far, where it was when it crashed included."""
        path = self._folder / f'{rank}.log'
        return path.read_text(errors='replace') if path.exists() else ''

    def kill(self) -> list[int | None]:
        """Sends SIGKILL to all ranks at once, as when the machine goes, and returns their exit codes."""
        for process in self._processes:
            if process.pid is not None and process.exitcode is None:
                process.kill()
        for process in self._processes:
            if process.pid is not None:
                process.join()
        return self.exit_codes

    def results(self) -> list[Any]:
        """Waits for all ranks and returns what the function returned, by rank.

        Raises:
            AssertionError: If a rank raised, or ended without a result. The others are killed then, since they would
                wait for it.
        """
        import torch

        # A rank ends by itself after its timeout, so that the limits here are for one that is beyond that.
        self._wait(until=time.monotonic() + self._timeout + 30, stop_at_failure=True)
        failed = self._failed()
        if failed:
            self._wait(until=time.monotonic() + GRACE, stop_at_failure=False)
        killed = [rank for rank, code in enumerate(self.exit_codes) if code is None]
        if failed or killed:
            failed = self._failed()
            self.kill()
            raise AssertionError('\n'.join([self._describe(rank) for rank in failed] + _describe_killed(killed)))
        return [torch.load(self._folder / f'{rank}.pt', weights_only=False) for rank in range(self.world_size)]

    def close(self) -> None:
        """Kills what is still running and removes what the ranks have left."""
        self.kill()
        self._port.close()
        self._temporary.cleanup()

    def _wait(self, until: float, stop_at_failure: bool) -> None:
        while running := [process for process in self._processes if process.exitcode is None]:
            if (stop_at_failure and self._failed()) or (left := until - time.monotonic()) <= 0:
                return
            connection.wait([process.sentinel for process in running], timeout=left)

    def _failed(self) -> list[int]:
        """Returns the ranks that have failed, the first one first."""
        failed = [rank for rank, code in enumerate(self.exit_codes) if code]
        return sorted(failed, key=lambda rank: self._time_of_failure(rank))

    def _time_of_failure(self, rank: int) -> float:
        path = self._folder / f'{rank}.error'
        # One without a traceback was killed, which is a cause and no consequence.
        return path.stat().st_mtime if path.exists() else 0.0

    def _describe(self, rank: int) -> str:
        error = self._folder / f'{rank}.error'
        if error.exists():
            return f'Rank {rank} of {self.world_size} raised:\n{error.read_text()}'
        code = self.exit_codes[rank]
        assert code is not None, 'a rank that failed has ended'
        name = f' ({signal.Signals(-code).name})' if -code in signal.Signals.__members__.values() else ''
        return (
            f'Rank {rank} of {self.world_size} ended with exit code {code}{name} and no result. It printed:\n'
            f'{self.output(rank)[-20000:]}'
        )


def start_server() -> None:
    """Starts what the ranks are forked from, which takes ten seconds until it is ready, and does nothing the next time.

    The ranks have the environment that the session has now.
    """
    environment = {
        # The ranks are CPU processes also where there is a GPU, which no process may use after a fork.
        'CUDA_VISIBLE_DEVICES': '',
        # A module of ours that the server does not find, every rank would import.
        'PYTHONPATH': os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')]),
    }
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()


def start_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT, **kwargs: Any
) -> Ranks:
    """Starts ``function(*args, **kwargs)`` on every rank; to be used in a ``with`` statement."""
    return Ranks(function, world_size, args, kwargs, timeout)


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT, **kwargs: Any
) -> list[Any]:
    """Runs ``function(*args, **kwargs)`` on every rank and returns the results by rank; see :class:`Ranks`."""
    with start_ranks(function, world_size, *args, timeout=timeout, **kwargs) as ranks:
        return ranks.results()


def _describe_killed(ranks: list[int]) -> list[str]:
    return [f'Killed while they were running: {ranks}.'] if ranks else []


def _run_rank(rank: int, world_size: int, port: int, folder: Path, call: bytes, timeout: float) -> None:
    """What a process does; it never returns, for a process group that is destroyed at exit may hang."""
    with open(folder / f'{rank}.log', 'wb', buffering=0) as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
            # A rank that crashes would take what it has not written yet with it.
            stream.reconfigure(line_buffering=True)
    faulthandler.enable()
    # Ends the process without Python's help, and also if nobody is left to kill it.
    faulthandler.dump_traceback_later(timeout, exit=True)
    threading.Thread(target=_end_with_session, daemon=True).start()
    # Nothing that Composer writes without being told where may end up in the repository.
    os.chdir(folder)
    try:
        _set_environment(rank, world_size, port)
        import composer.utils.checkpoint
        import torch

        torch.set_num_threads(1)
        # Composer reads the rank when it is imported, which was in the server.
        composer.utils.checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f'__{rank}_0.distcp'
        function, args, kwargs = pickle.loads(call)
        torch.save(function(*args, **kwargs), folder / f'{rank}.part')
        (folder / f'{rank}.part').rename(folder / f'{rank}.pt')
        # One that leaves early resets connections that the others still read from.
        while not all((folder / f'{other}.pt').exists() for other in range(world_size)):
            time.sleep(0.005)
    except BaseException:
        (folder / f'{rank}.error').write_text(traceback.format_exc())
        _leave(1)
    _leave(0)


def _end_with_session() -> None:
    session = multiprocessing.parent_process()
    assert session is not None, 'ranks are never the first process'
    connection.wait([session.sentinel])
    os._exit(1)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _set_environment(rank: int, world_size: int, port: int) -> None:
    """Sets what a launcher sets; without one, what an earlier run has left in the session's environment goes."""
    launcher = {
        'RANK': rank,
        'WORLD_SIZE': world_size,
        'LOCAL_RANK': rank,
        'LOCAL_WORLD_SIZE': world_size,
        'NODE_RANK': 0,
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': port,
    }
    for name, value in launcher.items():
        os.environ.pop(name, None)
        if world_size > 1:
            os.environ[name] = str(value)
