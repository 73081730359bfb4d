# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Packing: what fits together, and that no document of a row sees another."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from composer_bema.training.config import ConfigError
from composer_bema.training.data.loaders import IGNORED_LABEL, count_tokens
from composer_bema.training.data.packing import (
    PackedRows,
    best_fit,
    check_packing,
    collate_packed,
    keeps_documents_apart,
)


def test_longest_first_into_the_fullest_row():
    # 6 | 5 | 4 fills the first row to 10; 3 goes to the fuller of the open rows; 2 opens no new one.
    assert best_fit([3, 6, 4, 5, 2], capacity=10) == [[1, 2], [3, 0, 4]]


@given(st.lists(st.integers(1, 20), max_size=50))
def test_every_item_once_and_no_row_too_long(lengths):
    rows = best_fit(lengths, capacity=20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 20 for row in rows)
    # Two rows that would fit into one are never left.
    totals = sorted(sum(lengths[item] for item in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > 20


def sample(*tokens):
    return {'input_ids': torch.tensor(tokens), 'labels': torch.tensor(tokens)}


def test_a_packed_batch():
    samples = [sample(5, 6, 7), sample(8, 9), sample(3, 4)]
    rows = PackedRows(samples, [[0, 1], [2]])  # pyright: ignore[reportArgumentType]
    batch = collate_packed([rows[0], rows[1]], max_seq_len=6, pad_token_id=0)
    ignored = IGNORED_LABEL
    assert batch['input_ids'].tolist() == [[5, 6, 7, 8, 9, 0], [3, 4, 0, 0, 0, 0]]
    assert batch['labels'].tolist() == [[ignored, 6, 7, ignored, 9, ignored], [ignored, 4] + [ignored] * 4]
    assert batch['position_ids'].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch['sequence_id'].tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]]
    assert count_tokens(batch) == {'total': 7, 'loss_generating': 4}


def test_the_loss_of_a_packed_row_is_that_of_its_documents(make_causal_lm):
    model = make_causal_lm(use_cache=False).eval()
    samples = [sample(5, 6, 7), sample(8, 9)]
    packed = collate_packed([samples], max_seq_len=8, pad_token_id=0)
    del packed['sequence_id']
    losses = [model(**{key: value[None] for key, value in one.items()}).loss for one in samples]
    # Means over two targets and one.
    expected = (2 * losses[0] + losses[1]) / 3
    torch.testing.assert_close(model(**packed).loss, expected)


def test_models_that_look_across_are_found_out(make_causal_lm):
    # The cache that a model would use to generate does not matter.
    model = make_causal_lm(use_cache=True)
    assert keeps_documents_apart(model)
    assert model.training
    check_packing(model, 'train_loader.dataset.packing')

    class Leaky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, position_ids, **kwargs):
            everything = torch.ones_like(input_ids)
            return self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=everything, **kwargs)

    assert not keeps_documents_apart(Leaky())


def test_packing_that_a_model_looks_across_is_refused(make_causal_lm):
    model = make_causal_lm(attn_implementation='eager')
    forward = model.forward
    model.forward = lambda input_ids, **kwargs: forward(
        input_ids, **{**kwargs, 'attention_mask': torch.ones_like(input_ids)}
    )
    message = r'^held_out.packing: LlamaForCausalLM lets packed conversations see each other with .*; use packing: f'
    with pytest.raises(ConfigError, match=message):
        check_packing(model, 'held_out.packing')


@pytest.mark.parametrize('lengths', [[], [20]])
def test_edges(lengths):
    assert best_fit(lengths, capacity=20) == [[0]] * len(lengths)
