# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Joining and cutting texts, and holding some of the blocks out."""

import numpy as np
import pytest

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import TokenBlocks, select_part, token_blocks
from composer_bema.training.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer({'name': 'bytes'})


def test_texts_are_joined_by_the_end_token_and_the_rest_is_dropped():
    a, b, c, d = (ord(letter) + 3 for letter in 'abcd')
    blocks = list(token_blocks(['abc', 'd'], TOKENIZER, 2))
    assert [block.tolist() for block in blocks] == [[a, b], [c, 1], [d, 1]]
    assert [block.tolist() for block in token_blocks(['abc', 'd'], TOKENIZER, 4)] == [[a, b, c, 1]]
    assert {block.dtype for block in blocks} == {np.dtype('int64')}


def test_blocks_of_one_token_have_nothing_to_predict():
    with pytest.raises(ConfigError, match='max_seq_len must be at least 2 tokens'):
        list(token_blocks(['abc'], TOKENIZER, 1))


def test_a_block_is_its_own_target():
    sample = TokenBlocks(np.array([[5, 6, 7]]))[0]
    assert sample['input_ids'].tolist() == sample['labels'].tolist() == [5, 6, 7]


@pytest.mark.parametrize('count', [2, 3, 10, 101])
@pytest.mark.parametrize('fraction', [0.01, 0.5, 0.99])
def test_parts_are_disjoint_complete_and_never_empty(count, fraction):
    train = select_part(count, 'train', fraction, seed=1)
    held_out = select_part(count, 'held_out', fraction, seed=1)
    assert train
    assert held_out
    assert sorted([*train, *held_out]) == list(select_part(count, 'all', fraction, seed=1)) == list(range(count))


def test_the_choice_depends_on_the_seed_alone():
    assert select_part(100, 'held_out', 0.9, 1) == select_part(100, 'held_out', 0.9, 1)
    assert select_part(100, 'held_out', 0.9, 1) != select_part(100, 'held_out', 0.9, 2)
    assert len(select_part(100, 'held_out', 0.9, 1)) == 10


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((10, 'test', 0.9, 1), "part must be 'train', 'held_out' or 'all', not 'test'"),
        ((10, 'train', 1.0, 1), 'train_fraction must lie between 0 and 1, not 1.0'),
        ((1, 'train', 0.9, 1), 'too little to hold any out'),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        select_part(*arguments)
