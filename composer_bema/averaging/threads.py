# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Work on host memory shared among threads, each of which goes on to the next piece when it is done with one.

torch's own threads divide every operation into equal parts and wait for the slowest, which beside another program on
the machine is one that waits for a core: of the thousands of short operations of an update each then takes many times
as long. Here no thread waits for another but at the very end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Optional, TypeVar

import torch

__all__ = ['share_out']

Item = TypeVar('Item')
Result = TypeVar('Result')

# More threads than this do not make memory faster, and take turns at Python's lock.
_MOST_THREADS = 16


def share_out(make_worker: Callable[[], Callable[[Item], Result]], items: Iterable[Item], most: int) -> list[Result]:
    """Calls a worker's function with every item, and returns the results in the order of the items.

    Args:
        make_worker (Callable[[], Callable[[Item], Result]]): Makes the function that one thread calls, with memory of
            its own if it needs any: for all threads before the first item. The function is called without gradients,
            and its operations run on its own thread alone.
        items (Iterable[Item]): The items.
        most (int): The most threads that have enough to do, this one included; no more are taken than torch would.

    Raises:
        BaseException: What a function raises. Other threads finish the item that they are at.
    """
    threads = max(min(torch.get_num_threads(), _MOST_THREADS, most), 1)
    own, *others = [make_worker() for _ in range(threads)]
    shared = _Shared(items)
    with _single_threaded_operations():
        # No pool: none can be used any more when the process ends, and waits for an update in another thread.
        helpers: list[threading.Thread] = []
        try:
            with contextlib.suppress(RuntimeError):  # No more threads can be had; those that there are do it all.
                for worker in others:
                    helpers.append(threading.Thread(target=shared.help, args=(worker,)))
                    helpers[-1].start()
            shared.work(own)
        finally:
            _join(helpers)
        if shared.error is not None:
            raise shared.error
    return [shared.results[index] for index in sorted(shared.results)]


class _Shared(Generic[Item, Result]):
    """What the threads share: the items that wait, and the results by their number."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.results: dict[int, Result] = {}
        self.error: Optional[BaseException] = None
        self._waiting: Iterator[tuple[int, Item]] = enumerate(items)
        self._lock = threading.Lock()
        self._in_inference_mode = torch.is_inference_mode_enabled()

    def work(self, function: Callable[[Item], Result]) -> None:
        """Does one item after the other until there is none left, or another thread has failed."""
        # The modes are a thread's own.
        with torch.inference_mode(self._in_inference_mode), torch.no_grad():
            try:
                while (following := self._next()) is not None:
                    index, item = following
                    self.results[index] = function(item)
            except BaseException:
                self._waiting = iter(())
                raise

    def help(self, function: Callable[[Item], Result]) -> None:
        """Works in a thread of its own, and keeps the error for the one that waits for it."""
        torch.set_num_threads(1)
        try:
            self.work(function)
        except BaseException as error:
            self.error = error

    def _next(self) -> Optional[tuple[int, Item]]:
        with self._lock:
            return next(self._waiting, None)


def _join(threads: Iterable[threading.Thread]) -> None:
    """Waits for threads whatever interrupts it: none may go on writing when its caller clears up after a ^C."""
    interruption = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:
                interruption = error
    if interruption is not None:
        raise interruption


@contextlib.contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """Makes the operations of this thread run on it alone, and restores what it and threads to come have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
