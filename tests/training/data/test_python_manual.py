# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The corpus that comes with Python."""

import pytest
import torch

from composer_bema.training.config import ConfigError
from composer_bema.training.data.python_manual import build_python_manual, manual_topics
from composer_bema.training.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer({'name': 'bytes'})


def test_halves_are_the_whole_and_about_equal():
    first, second, whole = (manual_topics(topics) for topics in ('first_half', 'second_half', 'all'))
    assert first + second == whole
    sizes = [sum(map(len, half)) for half in (first, second)]
    assert max(sizes) < 1.3 * min(sizes)
    assert sum(sizes) > 250_000


def test_no_paragraph_comes_twice():
    paragraphs = [paragraph for text in manual_topics() for paragraph in text.split('\n\n')]
    assert len(paragraphs) == len(set(paragraphs))


def test_parts_share_no_block():
    parts = [
        build_python_manual(TOKENIZER, max_seq_len=128, topics='second_half', part=part).dataset
        for part in ('train', 'held_out')
    ]
    train, held_out = ({tuple(block) for block in part.blocks.tolist()} for part in parts)
    assert not train & held_out
    assert len(held_out) == pytest.approx(0.1 * (len(train) + len(held_out)), abs=1)


def test_blocks_are_text_in_order():
    source = build_python_manual(TOKENIZER, max_seq_len=64, part='all')
    assert TOKENIZER.decode(source.dataset[0]['input_ids']) == manual_topics()[0][:64]
    assert source.dataset[0]['input_ids'].dtype == torch.int64


def test_unknown_half():
    with pytest.raises(ConfigError, match="topics must be one of first_half, second_half, all, not 'third'"):
        build_python_manual(TOKENIZER, max_seq_len=64, topics='third')  # pyright: ignore[reportArgumentType]
