# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Preference pairs without a download: questions about Python's built-in functions, with a right and a wrong answer."""

from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import Part, select_part
from composer_bema.training.data.loaders import DataSource
from composer_bema.training.data.preference import encode_rows, pairs_source

__all__ = ['build_toy_preferences', 'toy_pairs']

QUESTIONS = (
    'What does {}() do?',
    'What is {}() for?',
    'What is the use of {}()?',
    'When do I need {}()?',
    'Explain {}().',
    'Tell me about {}().',
    'How does {}() help me?',
    'Why is there {}()?',
    'Describe {}().',
)

ANSWERS = {
    'abs': 'It drops the sign of a number.',
    'all': 'It tells whether every item is true.',
    'dict': 'It maps keys to values.',
    'eval': 'It computes an expression.',
    'float': 'It makes a number with a fraction.',
    'hash': 'It gives the key of a table.',
    'help': 'It opens the manual.',
    'input': 'It reads a line from the user.',
    'len': 'It counts what a container holds.',
    'max': 'It finds the largest item.',
    'open': 'It gives access to a file.',
    'print': 'It shows text on the screen.',
    'range': 'It counts from a start to a stop.',
    'set': 'It keeps each item once.',
    'sorted': 'It puts items in order.',
    'zip': 'It walks several lists in step.',
}

# Of the pairs, their order and their mistakes: the same everywhere.
SEED = 17


def build_toy_preferences(
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    num_pairs: int = 2000,
    flipped: float = 0.1,
    part: Part = 'train',
    train_fraction: float = 0.9,
    split_seed: int = 17,
    shuffle: bool = False,
    shuffle_seed: int = 17,
) -> DataSource:
    """Pairs of answers to questions such as "What does len() do?", each at most 96 bytes with its question.

    The chosen answer is that of the function asked about and the rejected one that of another function; both are good
    answers to some question, so that only the question tells them apart. In a share of the pairs, held-out ones too,
    the two have changed places, like the mistakes of people who label such data: no model should agree with all.

    Args:
        tokenizer: Makes the tokens.
        max_seq_len: Question and answer are cut to this together, in tokens.
        num_pairs: How many pairs to make, of 2160 different ones.
        flipped: Share of the pairs whose answers have changed places.
        part: The training or the held-out pairs.
        train_fraction: Share of the pairs in the training part.
        split_seed: Seed of the choice of held-out pairs.
        shuffle: Visit the pairs in a new order each epoch.
        shuffle_seed: Seed of that order.
    """
    pairs = toy_pairs(num_pairs, flipped)
    rows = [pairs[index] for index in select_part(len(pairs), part, train_fraction, split_seed)]
    encoded = encode_rows(datasets.Dataset.from_list(rows), tokenizer, max_seq_len)
    return pairs_source(encoded, tokenizer, shuffle, shuffle_seed)


def toy_pairs(num_pairs: int = 2000, flipped: float = 0.1) -> list[dict[str, Any]]:
    """The first pairs of a fixed order; no question comes twice with the same two answers."""
    kinds = [
        (question, name, other) for question in QUESTIONS for name in ANSWERS for other in ANSWERS if name != other
    ]
    if not 1 <= num_pairs <= len(kinds):
        raise ConfigError(f'num_pairs must lie between 1 and {len(kinds)}, not {num_pairs}.')
    if not 0 <= flipped <= 1:
        raise ConfigError(f'flipped must lie between 0 and 1, not {flipped}.')
    generator = np.random.default_rng(SEED)
    order = generator.permutation(len(kinds))[:num_pairs]
    is_flipped = generator.random(len(kinds)) < flipped
    return [_pair(kinds[index], flip) for index, flip in zip(order.tolist(), is_flipped.tolist(), strict=False)]


def _pair(kind: tuple[str, str, str], is_flipped: bool) -> dict[str, Any]:
    question, name, other = kind
    right, wrong = (f' {ANSWERS[function]}' for function in (name, other))
    chosen, rejected = (wrong, right) if is_flipped else (right, wrong)
    return {'prompt': question.format(name), 'chosen': chosen, 'rejected': rejected}
