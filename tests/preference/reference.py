# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""DPO with a reference model that follows BEMA, from the formulas: one sequence at a time, slow and obvious."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = dict[str, list[int]]
Weights = dict[str, Tensor]


def completion_log_prob(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """The sum over the completion's tokens of their log-probabilities, each given all tokens before it."""
    tokens = torch.tensor(prompt + completion)
    log_probs = functional.log_softmax(model(input_ids=tokens[None]).logits[0], dim=-1)
    # The logits at a position are those of the token that follows it.
    positions = torch.arange(len(prompt), len(tokens))
    return log_probs[positions - 1, tokens[positions]].sum()


def pair_loss(
    policy: torch.nn.Module, reference: torch.nn.Module, pair: Pair, beta: float, loss_type: str, label_smoothing: float
) -> Tensor:
    r"""The loss of one pair, of the log-ratios of policy and reference over the chosen and the rejected completion.

    ``sigmoid`` is -(1 - eps) log sigma(beta h) - eps log sigma(-beta h), with h their difference. ``ipo`` is
    (h - 1 / (2 beta))^2, with each log-ratio averaged over the tokens of its completion.
    """
    ratios = {}
    for side in ('chosen_ids', 'rejected_ids'):
        with torch.no_grad():
            anchor = completion_log_prob(reference, pair['prompt_ids'], pair[side])
        ratios[side] = completion_log_prob(policy, pair['prompt_ids'], pair[side]) - anchor
        if loss_type == 'ipo':
            ratios[side] = ratios[side] / len(pair[side])
    h = ratios['chosen_ids'] - ratios['rejected_ids']
    if loss_type == 'ipo':
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == 'sigmoid':
        right, wrong = functional.logsigmoid(beta * h), functional.logsigmoid(-beta * h)
        return -(1 - label_smoothing) * right - label_smoothing * wrong
    raise ValueError(f'loss_type must be sigmoid or ipo, but is {loss_type!r}.')


class PlainBEMA:
    """BEMA of the policy's weights by its formulas, and when the reference model takes it.

    Args:
        policy (Module): The model at step 0.
        settings (dict): The arguments of TRL's ``BEMACallback``, by name.
    """

    def __init__(self, policy: torch.nn.Module, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.average: Weights | None = None
        self._snapshot(policy)

    def _snapshot(self, policy: torch.nn.Module) -> None:
        self.theta_0 = {name: value.detach().clone() for name, value in policy.named_parameters()}
        self.ema = dict(self.theta_0)

    def _update(self, policy: torch.nn.Module, t: int) -> None:
        age = self.settings['lag'] + self.settings['multiplier'] * t
        beta = max(age ** -self.settings['ema_power'], self.settings['min_ema_multiplier'])
        alpha = age ** -self.settings['bias_power']
        theta = {name: value.detach() for name, value in policy.named_parameters()}
        self.ema = {name: (1 - beta) * self.ema[name] + beta * theta[name] for name in theta}
        self.average = {name: self.ema[name] + alpha * (theta[name] - self.theta_0[name]) for name in theta}

    def step(self, policy: torch.nn.Module, reference: torch.nn.Module, t: int) -> None:
        """Follows the policy after its step t, the first being 1, and has the reference follow where it is time."""
        updates = t - self.settings['update_after']
        if updates == 0:
            self._snapshot(policy)
        elif updates > 0 and updates % self.settings['update_freq'] == 0:
            self._update(policy, t)
        since = t - self.settings['ref_model_update_after']
        if since >= 0 and since % self.settings['ref_model_update_freq'] == 0 and self.average is not None:
            with torch.no_grad():
                for name, value in reference.named_parameters():
                    value.copy_(self.average[name])


def train_dpo(
    model: torch.nn.Module,
    pairs: list[Pair],
    batch_size: int,
    steps: int,
    learning_rate: float,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    bema: dict[str, Any] | None,
) -> tuple[list[float], Weights, torch.nn.Module]:
    """Trains a copy of the model, whose own weights stay as they are, and are the reference's at first.

    Returns:
        The loss of every step, before its update; the state dict of the reference at the end; the policy at the end.
    """
    if len(pairs) < steps * batch_size:
        raise ValueError(f'{steps} steps need {steps * batch_size} pairs, and there are {len(pairs)}.')
    # Evaluation mode: nothing is dropped out.
    policy, reference = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False
    )
    follower = None if bema is None else PlainBEMA(policy, bema)
    losses = []
    for t in range(1, steps + 1):
        batch = pairs[(t - 1) * batch_size : t * batch_size]
        terms = [pair_loss(policy, reference, pair, beta, loss_type, label_smoothing) for pair in batch]
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if follower is not None:
            follower.step(policy, reference, t)
    return losses, {name: value.clone() for name, value in reference.state_dict().items()}, policy
