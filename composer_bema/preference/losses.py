# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

r"""What DPO computes from logits: log-probabilities of completions, the losses, the divergence from the reference.

Tokens that belong to no completion (prompts, padding) have a negative label.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

__all__ = ['LossType', 'completion_log_probs', 'completion_mask', 'preference_losses', 'token_divergences']

LossType = Literal['sigmoid', 'ipo']

# Tokens whose distributions over the vocabulary are held in fp32 at a time.
_TOKENS_AT_A_TIME = 512


def completion_mask(labels: torch.Tensor) -> torch.Tensor:
    """Returns which positions predict a token of a completion: shape (rows, tokens - 1) for labels (rows, tokens)."""
    return labels[:, 1:] >= 0


def completion_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the log-probability of each row's completion, the sum over its tokens, in nats and fp32.

    Args:
        logits (torch.Tensor): Those at the positions of :func:`completion_mask`, of shape (completion tokens of all
            rows, vocabulary).
        labels (torch.Tensor): The tokens, of shape (rows, tokens).
    """
    mask = completion_mask(labels)
    log_probs = -functional.cross_entropy(logits.float(), labels[:, 1:][mask], reduction='none')
    return log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs).sum(dim=1)


def preference_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    beta: float,
    loss_type: LossType = 'sigmoid',
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""Returns the loss of each pair, from how much likelier the policy makes its completions than the reference.

    .. math::
        \text{sigmoid: } & -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h) \\
        \text{ipo: } & (h - 1 / (2 \beta))^2

    where h is ``chosen - rejected``. The first is Rafailov et al. (arXiv 2305.18290) with the label smoothing of
    conservative DPO, the second Azar et al. (arXiv 2310.12036).

    Args:
        chosen (torch.Tensor): :math:`\log \pi - \log \pi_{ref}` of the chosen completions in nats, shape (pairs,); per
            token of the completion for ``ipo``, whose authors mean averages.
        rejected (torch.Tensor): The same of the rejected ones.
        beta (float): The strength of the pull towards the reference.
        loss_type (str): ``'sigmoid'`` or ``'ipo'``. Default: ``'sigmoid'``.
        label_smoothing (float): :math:`\epsilon`, the share of pairs that are thought to be the wrong way round.
    """
    margin = chosen - rejected
    if loss_type == 'ipo':
        return (margin - 1 / (2 * beta)) ** 2
    right, wrong = (functional.logsigmoid(sign * beta * margin) for sign in (1, -1))
    return -(1 - label_smoothing) * right - label_smoothing * wrong


@torch.no_grad()
def token_divergences(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """Returns the divergence KL(policy || reference) of each token's distribution, in nats and fp32.

    Args:
        logits (torch.Tensor): The policy's, of shape (tokens, vocabulary).
        reference_logits (torch.Tensor): The reference's, of the same shape.
    """
    divergences = [logits.new_zeros(0, dtype=torch.float32)]
    for both in zip(logits.split(_TOKENS_AT_A_TIME), reference_logits.split(_TOKENS_AT_A_TIME), strict=True):
        policy, reference = (part.float().log_softmax(dim=-1) for part in both)
        divergences.append((policy.exp() * (policy - reference)).sum(dim=-1))
    return torch.cat(divergences)
