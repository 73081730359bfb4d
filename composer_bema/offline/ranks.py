# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Several processes at one task: who does what, and that none waits for one that has failed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ['all_succeed', 'from_first_rank', 'is_first_rank', 'joined', 'leave_process_group', 'share_out', 'union']

T = TypeVar('T')

log = logging.getLogger(__name__)

# Marks an error that all ranks know of.
_IS_TOLD = '_is_told'


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that ``torchrun`` or ``composer`` has started, if there are several."""
    if int(os.environ.get('WORLD_SIZE', '1')) == 1 or dist.is_initialized():
        yield
        return
    # The others wait for the slowest, and for the first rank while it completes what all have written.
    dist.init_process_group('gloo', timeout=timedelta(days=1))
    try:
        with all_succeed():
            yield
    except Exception:
        leave_process_group()
        raise
    leave_process_group()


def leave_process_group() -> None:
    """Leaves the process group of gloo, which is gone afterwards. Every rank has to call it."""
    dist.barrier()
    # gloo's threads want Python's lock to let go of their last tensors. The group would hold it while it waits for them
    # to end; the backend, if it goes last, does not.
    backend = dist.group.WORLD._get_backend(torch.device('cpu'))  # type: ignore
    dist.destroy_process_group()
    del backend


def is_first_rank() -> bool:
    """Returns whether this is the process that speaks and creates for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share_out(items: Sequence[T], sizes: Sequence[int]) -> list[T]:
    """Returns this rank's share of items, so that the shares are about equally large."""
    if not dist.is_initialized():
        return list(items)
    loads = [0] * dist.get_world_size()
    mine = []
    for index in sorted(range(len(items)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        if rank == dist.get_rank():
            mine.append(items[index])
    return mine


@contextlib.contextmanager
def all_succeed() -> Iterator[None]:
    """Waits for all ranks at the end of the block, and raises on each of them if it failed on one.

    A failure is told once. The others hear of it where they wait next, be it in the block or at its end.

    Raises:
        ValueError: What went wrong on another rank.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, _IS_TOLD):
            if dist.is_initialized():
                # Before the others have come so far as to hear of it.
                log.error('Rank %d: %s', dist.get_rank(), error)
            _exchange(None, f'{error}')
            setattr(error, _IS_TOLD, True)
        raise
    _exchange(None)


def from_first_rank(value: T) -> T:
    """Returns the first rank's value on all."""
    return _exchange(value)[0]


def union(part: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the items of all ranks' dicts."""
    return {key: value for found in _exchange(part) for key, value in found.items()}


def _exchange(value: T, failure: str | None = None) -> list[T]:
    """Returns all ranks' values; ranks talk in no other way, so that a failure is heard whatever one waits for."""
    if not dist.is_initialized():
        return [value]
    received: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(received, (value, failure))
    failures = [other for _, other in received if other is not None]
    if failures and failure is None:
        error = ValueError(failures[0])
        setattr(error, _IS_TOLD, True)
        raise error
    return [other for other, _ in received]
