# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Losses on texts against transformers' own, and against sums written out."""

import math

import pytest
import torch

from composer_bema.evaluation.loss import measure_loss
from tests.evaluation.models import make_model


def batch_of(rows, tokens=12, seed=0):
    ids = torch.randint(3, 259, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids)}


def values(measurements):
    return {m.metric: m.value for m in measurements}


def test_loss_is_that_of_transformers():
    model, batch = make_model(), batch_of(5)
    found = measure_loss('loss-text', model, [batch])
    expected = model(**batch).loss.item()
    assert values(found)['loss'] == pytest.approx(expected, rel=1e-6)
    assert values(found)['perplexity'] == pytest.approx(math.exp(expected), rel=1e-6)
    hits = model(batch['input_ids']).logits[:, :-1].argmax(-1) == batch['labels'][:, 1:]
    assert values(found)['token accuracy'] == pytest.approx(hits.double().mean().item())
    assert {(m.task, m.count) for m in found} == {('loss-text', 5)}


def test_batches_make_no_difference():
    batch = batch_of(6)
    whole = measure_loss('loss-text', make_model(), [batch])
    parts = measure_loss('loss-text', make_model(), [{n: t[i : i + 2] for n, t in batch.items()} for i in (0, 2, 4)])
    for a, b in zip(whole, parts, strict=True):
        assert (a.value, a.standard_error) == pytest.approx((b.value, b.standard_error), rel=1e-6)


def test_every_predicted_token_weighs_the_same():
    batch = batch_of(2)
    # One row has 11 tokens to predict, the other 3.
    batch['labels'][1, 4:] = -100
    model = make_model()
    logs = -model(batch['input_ids']).logits.log_softmax(-1)
    losses = logs[:, :-1].gather(-1, batch['input_ids'][:, 1:, None])[..., 0].double()
    sums = [losses[0].sum().item(), losses[1, :3].sum().item()]
    mean = sum(sums) / 14
    found, perplexity, _ = measure_loss('loss-text', model, [batch])
    assert found.value == pytest.approx(mean, rel=1e-6)
    # A ratio of two sums: the variance of sum - mean * count over rows, by the square of their mean count.
    residuals = [sums[0] - mean * 11, sums[1] - mean * 3]
    error = math.sqrt(sum(r**2 for r in residuals) / 1 / 2) / 7
    assert found.standard_error == pytest.approx(error, rel=1e-5)
    assert perplexity.standard_error == pytest.approx(error * math.exp(mean), rel=1e-5)


def test_padding_is_not_read():
    batch = batch_of(1, tokens=8)
    padded = {
        'input_ids': torch.nn.functional.pad(batch['input_ids'], (0, 4)),
        'labels': torch.nn.functional.pad(batch['labels'], (0, 4), value=-100),
        'attention_mask': torch.nn.functional.pad(batch['attention_mask'], (0, 4)),
    }
    alone, beside = (measure_loss('loss-text', make_model(), [b])[0].value for b in (batch, padded))
    assert alone == pytest.approx(beside, rel=1e-6)


def test_bf16_logits_are_summed_in_fp32():
    model, batch = make_model(dtype=torch.bfloat16), batch_of(4)
    logits = model(batch['input_ids']).logits.float()[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch['labels'][:, 1:].flatten()).item()
    assert measure_loss('loss-text', model, [batch])[0].value == pytest.approx(expected, rel=1e-6)


def test_dropout_is_off():
    model = make_model()
    model.train()
    measure_loss('loss-text', model, [batch_of(1)])
    assert not model.training


def test_a_loss_beyond_floats_has_an_infinite_perplexity():
    model = make_model()
    huge = type(model)(model.config)
    huge.load_state_dict({name: tensor * 100 for name, tensor in model.state_dict().items()})
    found = values(measure_loss('loss-text', huge, [batch_of(4)]))
    assert found['loss'] > 709
    assert found['perplexity'] == math.inf


@pytest.mark.parametrize('batches', [[], [{**batch_of(2), 'labels': torch.full((2, 12), -100)}]])
def test_nothing_to_predict(batches):
    with pytest.raises(ValueError, match=r'^loss-text has no token to predict: give it a longer text\.$'):
        measure_loss('loss-text', make_model(), batches)


def test_rows_that_are_too_long_or_none():
    with pytest.raises(ValueError, match='loss-text has rows of 12 tokens, and the context of the model 8: cut it'):
        measure_loss('loss-text', make_model(context=8), [batch_of(1)])
    pairs = {name: tensor[None] for name, tensor in batch_of(2).items()}
    with pytest.raises(ValueError, match=r'no rows of tokens, but batches of the shape \(1, 2, 12\)'):
        measure_loss('loss-text', make_model(), [pairs])
