# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Several processes at one task: who does what, and that none waits for one that has failed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ['all_succeed', 'from_first_rank', 'is_first_rank', 'joined', 'share_out', 'union']

T = TypeVar('T')


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that ``torchrun`` or ``composer`` has started, if there are several."""
    if int(os.environ.get('WORLD_SIZE', '1')) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group('gloo')
    try:
        yield
        # One that leaves while another still connects would break it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


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

    Raises:
        ValueError: What went wrong on another rank.
    """
    try:
        yield
    except Exception as error:
        _messages(f'{error}')
        raise
    failed = [message for message in _messages(None) if message is not None]
    if failed:
        raise ValueError(failed[0])


def from_first_rank(value: T) -> T:
    """Returns the first rank's value on all."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def union(part: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the items of all ranks' dicts."""
    if not dist.is_initialized():
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return {key: value for found in parts for key, value in found.items()}


def _messages(message: str | None) -> list[str | None]:
    if not dist.is_initialized():
        return [message]
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages
