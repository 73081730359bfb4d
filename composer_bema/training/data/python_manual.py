# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Text without a download: the language reference that comes with every CPython, as ``pydoc_data.topics``."""

from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import Part, block_dataset
from composer_bema.training.data.loaders import DataSource, pad_batch

__all__ = ['build_python_manual', 'manual_topics']

Topics = Literal['first_half', 'second_half', 'all']


def build_python_manual(
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    topics: Topics = 'all',
    part: Part = 'train',
    train_fraction: float = 0.9,
    split_seed: int = 17,
    shuffle: bool = False,
    shuffle_seed: int = 17,
) -> DataSource:
    """Blocks of ``max_seq_len`` tokens of Python's reference manual, about 0.4 MB of text.

    Args:
        tokenizer: Makes the tokens.
        max_seq_len: Tokens in a block.
        topics: Which half of the manual, in alphabetical order of its topics: data whose distribution can move.
        part: The training or the held-out blocks of that half.
        train_fraction: Share of the blocks in the training part.
        split_seed: Seed of the choice of held-out blocks.
        shuffle: Visit the blocks in a new order each epoch.
        shuffle_seed: Seed of that order.
    """
    blocks = block_dataset(manual_topics(topics), tokenizer, max_seq_len, part, train_fraction, split_seed)
    return DataSource(blocks, pad_batch(tokenizer), shuffle, shuffle_seed)


def manual_topics(topics: Topics = 'all') -> list[str]:
    """The manual's topics in alphabetical order, each paragraph kept only where it comes first.

    Topics quote each other at length; left in, the repetitions would put held-out text into the training part. The text
    is that of the running Python, so it differs a little between its versions.
    """
    from pydoc_data.topics import topics as manual  # half a megabyte, wanted by this loader only

    seen: set[str] = set()
    texts = []
    for _, text in sorted(manual.items()):
        paragraphs = [paragraph for paragraph in text.split('\n\n') if paragraph.strip()]
        texts.append('\n\n'.join(p for p in dict.fromkeys(paragraphs) if p not in seen))
        seen.update(paragraphs)
    texts = [text for text in texts if text]
    middle = _middle(texts)
    halves = {'first_half': texts[:middle], 'second_half': texts[middle:], 'all': texts}
    if topics not in halves:
        raise ConfigError(f'topics must be one of {", ".join(halves)}, not {topics!r}.')
    return halves[topics]


def _middle(texts: list[str]) -> int:
    """The number of leading texts that together come nearest to half of all characters."""
    ends = np.cumsum([len(text) for text in texts])
    return int(np.abs(ends - ends[-1] / 2).argmin()) + 1
