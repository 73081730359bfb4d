# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Texts as blocks of a fixed number of tokens, and the seeded choice of which of them are held out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError

__all__ = ['Part', 'TokenBlocks', 'block_dataset', 'select_part', 'token_blocks']

Part = Literal['train', 'held_out', 'all']


class TokenBlocks(Dataset):
    """Rows of tokens, each its own target.

    Args:
        blocks: Shape (number of blocks, tokens in a block).
    """

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {'input_ids': tokens, 'labels': tokens}


def block_dataset(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    part: Part,
    train_fraction: float,
    split_seed: int,
) -> TokenBlocks:
    """The training or the held-out blocks of texts; the arguments are those of `token_blocks` and `select_part`.

    Raises:
        ConfigError: The texts fill no block, or cannot be divided so.
    """
    blocks = list(token_blocks(texts, tokenizer, max_seq_len))
    if not blocks:
        raise ConfigError(f'the text holds fewer than max_seq_len={max_seq_len} tokens, not one block.')
    return TokenBlocks(np.stack(blocks)[select_part(len(blocks), part, train_fraction, split_seed)])


def token_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[np.ndarray]:
    """Tokenize texts, end each with the end-of-text token, join them and cut the stream into blocks.

    Yields:
        int64 arrays of exactly ``length`` tokens; what is left at the end and fills no block is dropped.
    """
    if length < 2:
        raise ConfigError(f'max_seq_len must be at least 2 tokens, one to read and one to predict, not {length}.')
    end: list[Any] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    waiting: list[int] = []
    for text in texts:
        encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
        waiting += [*encoded['input_ids'], *end]
        whole = len(waiting) // length * length
        for start in range(0, whole, length):
            yield np.array(waiting[start : start + length], dtype=np.int64)
        del waiting[:whole]


def select_part(count: int, part: Part, train_fraction: float, seed: int) -> Sequence[int]:
    """Indices of the training or the held-out part of ``count`` rows, in ascending order.

    Both parts come from one permutation that depends on ``count`` and ``seed`` alone, so they never overlap.

    Args:
        count: Rows to choose from.
        part: ``train``, ``held_out``, or ``all`` for every row.
        train_fraction: Share of the rows in ``train``, between 0 and 1; neither part is left empty.
        seed: Seed of the permutation.
    """
    if part == 'all':
        return range(count)
    if part not in ('train', 'held_out'):
        raise ConfigError(f"part must be 'train', 'held_out' or 'all', not {part!r}.")
    if not 0 < train_fraction < 1:
        raise ConfigError(f'train_fraction must lie between 0 and 1, not {train_fraction}; part: all takes every row.')
    if count < 2:
        raise ConfigError(f'{count} row is too little to hold any out; use part: all or more data.')
    split = min(max(round(count * train_fraction), 1), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return sorted((order[:split] if part == 'train' else order[split:]).tolist())
