# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Signals that wait until what must not be left half done is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ['uninterrupted']

_SIGNALS = signal.valid_signals()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds signals back for a block, and lets them through when it is over.

    Only the main thread is ever interrupted, so that in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    # What is handled by the system, or ignored, raises nothing here; Python's handlers may, at any line.
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda received, _: held.append(received))
        yield
    finally:
        # ^C comes back last, lest it interrupt this.
        for number in sorted(handlers, key=lambda number: number == signal.SIGINT):
            signal.signal(number, handlers[number])
        for number in held:
            signal.raise_signal(number)
