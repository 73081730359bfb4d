# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Checksums of tensors that add up: the digest of a whole is the sum of its parts', however it is cut into shards.

The bytes are taken as 64-bit words, each is multiplied by an odd coefficient of its index, and the products are summed
modulo 2^64. A word that differs always changes the sum; words that were exchanged, or a run of zeros where there were
values, change it but for odds of about 2^-60. A word that two shards share is the sum of their parts of it. It guards
against faulty disks and cut files, not against forgers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
import torch.distributed

from composer_bema.averaging.sharding import FlatShard, sum_over_ranks

__all__ = ['add_digests', 'digest', 'digests_of']

# Coefficients repeat from block to block up to an odd factor of the block, so that a table of one block suffices.
_BLOCK = 16 * 1024
_BLOCKS_AT_A_TIME = 512
# Bytes that are copied at a time where they are not aligned as words are.
_COPIED = 8 * 1024 * 1024
_MASK = 2**64 - 1
_GOLDEN_RATIO = 0x9E3779B97F4A7C15


@torch.no_grad()
def digest(tensor: torch.Tensor, start: int = 0) -> int:
    """Returns the digest of the values of ``tensor``.

    Args:
        tensor (torch.Tensor): The values, of any shape and dtype, in row-major order.
        start (int): The index of the first of them in the flattened whole. Default: ``0``.

    Returns:
        int: A signed 64-bit number, which depends on the bits and their places only.
    """
    # 64-bit integers wrap around, which is the modulus wanted.
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, words in _words(tensor, start):
        while words.numel():
            # As far as the block that has begun goes, or many whole ones.
            to_the_end = -index % _BLOCK
            whole = min(words.numel() // _BLOCK, _BLOCKS_AT_A_TIME) * _BLOCK
            head = words[: to_the_end or whole or words.numel()]
            total += _sum(head, index)
            words, index = words[head.numel() :], index + head.numel()
    return int(total.item())


def _sum(words: torch.Tensor, index: int) -> torch.Tensor:
    """Returns the sum of the products of whole blocks of words, or of words within one block."""
    block, offset = divmod(index, _BLOCK)
    rows = words.view(-1, min(words.numel(), _BLOCK))
    table = _coefficients(words.device)[offset : offset + rows.shape[1]]
    # There is no product of matrices of integers on a GPU.
    partial = rows.mv(table) if words.device.type == 'cpu' else (rows * table).sum(1)
    factors = [_signed(_GOLDEN_RATIO * b | 1) for b in range(block, block + rows.shape[0])]
    return (partial * torch.tensor(factors, device=words.device)).sum()


def add_digests(*digests: int) -> int:
    """Returns the digest of a whole from those of its parts."""
    return _signed(sum(digests))


def digests_of(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, int]]:
    """Returns the digests of tensors that are grouped by name.

    If there is a `FlatShard` among them, every rank has to call it. All get the same answer then, which for tensors
    that are whole is rank 0's.
    """
    flat = [tensor for group in tensors.values() for tensor in group.values()]
    sharded = [tensor for tensor in flat if isinstance(tensor, FlatShard)]
    if sharded:
        sums = iter(sum_over_ranks([_contribution(tensor) for tensor in flat], sharded[0].device))
    else:
        sums = iter([digest(tensor) for tensor in flat])
    return {name: {n: next(sums) for n in group} for name, group in tensors.items()}


def _contribution(tensor: torch.Tensor) -> int:
    if isinstance(tensor, FlatShard):
        return digest(tensor.local, tensor.shard.start) if tensor.shard.is_first_replica else 0
    return digest(tensor) if torch.distributed.get_rank() == 0 else 0


def _words(tensor: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the 64-bit words that the values are in, padded with zeros, and the index of the first of them."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    position = start * tensor.element_size()
    while flat.numel():
        lead = position % 8
        if lead == 0 and flat.data_ptr() % 8 == 0 and flat.numel() >= 8:
            piece = flat[: flat.numel() // 8 * 8]
            words = piece.view(torch.int64)
        else:
            piece = flat[: _COPIED - lead]
            words = torch.zeros((lead + piece.numel() + 7) // 8, dtype=torch.int64, device=flat.device)
            words.view(torch.uint8)[lead : lead + piece.numel()] = piece
        yield position // 8, words
        position += piece.numel()
        flat = flat[piece.numel() :]


@functools.lru_cache(maxsize=8)
def _coefficients(device: torch.device) -> torch.Tensor:
    """Returns a block of pseudo-random odd numbers: the finaliser of the SplitMix64 generator over the indices."""
    generated = []
    for index in range(1, _BLOCK + 1):
        z = index * _GOLDEN_RATIO & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        generated.append(_signed((z ^ z >> 31) | 1))
    return torch.tensor(generated, dtype=torch.int64, device=device)


def _signed(value: int) -> int:
    """Returns a number modulo 2^64 as two's complement has it."""
    return (value + 2**63 & _MASK) - 2**63
