# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Batches: padding, splitting, order, and what is counted."""

import numpy as np
import torch

from composer_bema.training.data.blocks import TokenBlocks
from composer_bema.training.data.loaders import (
    IGNORED_LABEL,
    DataSource,
    build_data_spec,
    count_tokens,
    pad_batch,
    split_batch,
)
from composer_bema.training.tokenizers import build_tokenizer

COLLATE = pad_batch(build_tokenizer({'name': 'bytes'}))


def sample(*tokens):
    return {'input_ids': torch.tensor(tokens), 'labels': torch.tensor(tokens)}


def test_padding_is_masked_no_target_and_not_counted():
    batch = COLLATE([sample(5, 6, 7), sample(8, 9)])
    assert batch['input_ids'].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch['attention_mask'].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch['labels'].tolist() == [[5, 6, 7], [8, 9, IGNORED_LABEL]]
    assert count_tokens(batch) == {'total': 5, 'loss_generating': 3}


def test_microbatches():
    batch = COLLATE([sample(row, row) for row in range(5)])
    pieces = split_batch(batch, 2)
    assert [len(piece['input_ids']) for piece in pieces] == [2, 2, 1]
    assert torch.cat([piece['labels'] for piece in pieces]).equal(batch['labels'])


def order_of(spec, epoch):
    spec.dataloader.sampler.set_epoch(epoch)
    return [row[0].item() for batch in spec.dataloader for row in batch['input_ids']]


def test_order_depends_on_seed_and_epoch_alone():
    dataset = TokenBlocks(np.arange(20).reshape(10, 2))
    specs = {seed: build_data_spec(DataSource(dataset, COLLATE, True, seed), 4) for seed in (1, 2)}
    assert order_of(specs[1], 0) == order_of(specs[1], 0) != order_of(specs[1], 1)
    assert order_of(specs[1], 0) != order_of(specs[2], 0)
    unshuffled = build_data_spec(DataSource(dataset, COLLATE, False, 1), 4, drop_last=True)
    assert order_of(unshuffled, 0) == [0, 2, 4, 6, 8, 10, 12, 14]
