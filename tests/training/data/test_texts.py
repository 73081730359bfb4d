# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Texts that every model of an evaluation reads alike."""

import random

import torch

from composer_bema.training.config import load_config
from composer_bema.training.data.texts import FirstBatches, texts_of_run
from composer_bema.training.tokenizers import build_tokenizer
from tests.training.tiny import tiny_settings, write_yaml


class Shuffling:
    """Other batches each time, as a streaming loader that shuffles has."""

    def __iter__(self):
        return iter(random.sample(range(1000), 10))


def test_the_first_batches_stay_the_same():
    batches = FirstBatches(Shuffling(), 3)
    assert len(list(batches)) == 3
    assert list(batches) == list(batches)


def test_all_batches_are_read_again():
    assert [list(FirstBatches([1, 2], None)) for _ in range(2)] == [[1, 2], [1, 2]]


def test_texts_of_a_run(tmp_path):
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)))
    texts = texts_of_run(config, batch_size=2, batches=1)(build_tokenizer({'name': 'bytes'}))
    # Two evaluators of the same text count once.
    assert list(texts) == ['train', 'held_out']
    first, again = (next(iter(texts['train'])) for _ in range(2))
    assert torch.equal(first['input_ids'], again['input_ids'])
    assert first['input_ids'].shape == (2, 32)
