# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Stand-ins for a GPU and for the worker, with which updates off the training thread are tested on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Optional

import pytest
import torch

from composer_bema.averaging import offload


class LateStaging(offload.Staging):
    """Copies that arrive when they are waited for, with the values of when they were asked for, as a stream's do.

    They are garbage before, and as soon as the next ones are asked for.
    """

    may_arrive = threading.Event()
    """Unset by a test that wants to look at what has not arrived."""

    @torch.no_grad()
    def copy(self, weights: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Callable[[], None]]:
        sent = [weight.clone() for weight in weights]
        self._make_room(weights)
        for kept in self._room:
            kept.fill_(float('nan') if kept.is_floating_point() else -1)

        def await_copies() -> None:
            assert self.may_arrive.wait(timeout=60), 'nobody let the copies arrive'
            for kept, weight in zip(self._room, sent, strict=True):
                kept.copy_(weight)

        return self._room, await_copies


class Procrastinator:
    """A worker that works when somebody waits for it, so that a reader that does not wait sees the old values."""

    def __init__(self, **kwargs: Any) -> None:
        self.undone: list[Postponed] = []

    def submit(self, work: Callable[..., None], *args: Any) -> Postponed:
        assert not any(not future.done for future in self.undone), 'two updates are in flight'
        self.undone = [Postponed(lambda: work(*args))]
        return self.undone[0]


class Postponed:
    """The future of a `Procrastinator`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.done = False
        self.error: Optional[BaseException] = None

    def exception(self) -> Optional[BaseException]:
        if not self.done:
            self.done = True
            try:
                self.work()
            except BaseException as error:
                self.error = error
        return self.error


def stand_in_for_gpu(patch: pytest.MonkeyPatch) -> None:
    """Has all updates computed by a worker, from copies that arrive late."""
    LateStaging.may_arrive.set()
    patch.setattr(offload, 'is_offloaded', lambda updates: True)
    patch.setattr(offload, 'Staging', LateStaging)
    patch.setattr(offload, 'pinned_like', torch.empty_like)
