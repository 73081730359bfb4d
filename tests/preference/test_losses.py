# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The arithmetic of DPO against formulas written out."""

import math

import pytest
import torch

from composer_bema.preference.losses import (
    completion_log_probs,
    completion_mask,
    preference_losses,
    token_divergences,
)


def test_only_completion_tokens_count_and_each_is_predicted_by_the_one_before():
    labels = torch.tensor([[-100, -100, 1, 0], [-100, 1, -100, -100]])
    assert completion_mask(labels).tolist() == [[False, True, True], [True, False, False]]
    # Logits whose probabilities are known: of token 1, a quarter, a half and an eighth.
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.875, 0.125]]).log()
    expected = [math.log(0.25) + math.log(0.5), math.log(0.125)]
    assert completion_log_probs(logits, labels).tolist() == pytest.approx(expected)


def test_a_first_token_that_nothing_predicts_does_not_count():
    assert not completion_mask(torch.tensor([[3]])).numel()
    assert completion_mask(torch.tensor([[3, -100]])).tolist() == [[False]]


def test_log_probs_of_half_precision_logits_are_summed_in_fp32():
    logits = torch.zeros(300, 2, dtype=torch.bfloat16)
    labels = torch.ones(1, 301, dtype=torch.long)
    assert completion_log_probs(logits, labels).item() == pytest.approx(-300 * math.log(2))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_sigmoid_loss(smoothing: float):
    chosen, rejected = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 1.0])
    losses = preference_losses(chosen, rejected, beta=0.4, label_smoothing=smoothing)
    for loss, h in zip(losses.tolist(), (0.25, -3.0), strict=True):
        right, wrong = (-math.log(1 / (1 + math.exp(-sign * 0.4 * h))) for sign in (1, -1))
        assert loss == pytest.approx((1 - smoothing) * right + smoothing * wrong)


def test_ipo_loss():
    losses = preference_losses(torch.tensor([1.0]), torch.tensor([-2.0]), beta=0.25, loss_type='ipo')
    assert losses.tolist() == [(3.0 - 2.0) ** 2]


def test_a_hopeless_pair_has_a_finite_loss_and_gradient():
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = preference_losses(chosen, torch.zeros(1), beta=0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1000)
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(-0.1)


def test_divergences_are_those_of_torch_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('composer_bema.preference.losses._TOKENS_AT_A_TIME', 3)
    policy, reference = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.kl_div(
        reference.log_softmax(-1), policy.log_softmax(-1), log_target=True, reduction='none'
    ).sum(-1)
    torch.testing.assert_close(token_divergences(policy, reference), expected)
    assert token_divergences(policy[:0], reference[:0]).shape == (0,)
