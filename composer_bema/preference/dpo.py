# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Direct preference optimisation of a causal language model, as a Composer model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import torch
from composer.models import HuggingFaceModel
from torchmetrics import MeanMetric, Metric

from composer_bema.averaging.decay import require_number
from composer_bema.averaging.parameters import canonical_names
from composer_bema.preference.losses import (
    LossType,
    completion_log_probs,
    completion_mask,
    preference_losses,
    token_divergences,
)
from composer_bema.preference.references import (
    add_reference_adapter,
    copy_to_reference,
    frozen_copy,
    reference_adapter,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ['DPO']

_POLICY, _REFERENCE = 'model.', 'reference_model.'

# The names of the metrics, and of what :meth:`DPO.forward` returns for each pair.
_METRICS = {
    'PreferenceLoss': 'loss',
    'RewardAccuracy': 'accuracy',
    'RewardMargin': 'margin',
    'RewardChosen': 'reward_chosen',
    'RewardRejected': 'reward_rejected',
    'LogProbChosen': 'log_prob_chosen',
    'LogProbRejected': 'log_prob_rejected',
    'ReferenceKL': 'divergence',
}


class _PairMean(MeanMetric):
    """The mean over pairs of one of the values that the model returns for each."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class DPO(HuggingFaceModel):
    r"""A policy that is trained on preferences, and the frozen reference that it is held against.

    The reference begins as a copy of the policy. It is a model of its own, ``reference_model``, or, where a PEFT
    adapter is trained, a second adapter on the same base, named ``reference``. It stays as it is unless something
    calls :meth:`update_reference`, as ``BEMA(update_ref_model=True)`` does, and it is part of the checkpoints.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``, int64 tensors of shape (pairs, 2, tokens): the
    chosen sequence of each pair and the rejected one, padded on the right. Labels are the tokens of the completion, and
    negative elsewhere.

    The metrics are means over pairs: ``PreferenceLoss``; ``RewardChosen`` and ``RewardRejected``, which are
    :math:`\beta (\log \pi - \log \pi_{ref})`; ``RewardMargin``, their difference; ``RewardAccuracy``, the share of
    pairs whose margin is positive; ``LogProbChosen`` and ``LogProbRejected``, in nats of the whole completion. And over
    the tokens of completions: ``ReferenceKL``, KL(policy || reference) in nats per token.

    Args:
        model (PreTrainedModel | PeftModel): The policy.
        tokenizer (PreTrainedTokenizerBase, optional): Goes into checkpoints. Default: ``None``.
        beta (float): The strength of the pull towards the reference, above 0. Default: ``0.1``.
        loss_type (str): ``'sigmoid'`` or ``'ipo'``. Default: ``'sigmoid'``.
        label_smoothing (float): The share of labels thought to be wrong, in [0, 0.5); for ``'sigmoid'`` only.
            Default: ``0``.
        use_train_metrics (bool): Compute the metrics of training batches too. Default: ``True``.

    Raises:
        TypeError: If ``beta`` or ``label_smoothing`` is no number.
        ValueError: If a setting is out of its range, or the policy trains what it would share with the reference, or
            has an adapter named ``reference``.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        beta: float = 0.1,
        loss_type: LossType = 'sigmoid',
        label_smoothing: float = 0.0,
        use_train_metrics: bool = True,
    ) -> None:
        _check_settings(beta, loss_type, label_smoothing)
        # Composer would save the trained adapter alone, by its name, without the reference's.
        super().__init__(model, tokenizer, use_logits=True, should_save_peft_only=False)  # pyright: ignore
        self.beta = beta
        self.loss_type: LossType = loss_type
        self.label_smoothing = label_smoothing
        self._use_train_metrics = use_train_metrics
        if self.using_peft:
            adapters = add_reference_adapter(model)
            self._reference_names = {_POLICY + n: _POLICY + reference for n, reference in adapters.items()}
        else:
            self.reference_model = frozen_copy(model)
            names = canonical_names(model, list(model.state_dict()))
            self._reference_names = {_POLICY + n: _REFERENCE + n for n in names}
        self.register_load_state_dict_pre_hook(_start_reference_from_policy)

    def train(self, mode: bool = True) -> DPO:
        """Leaves the reference without dropout."""
        super().train(mode)
        if not self.using_peft:
            self.reference_model.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns fp32 tensors of shape (pairs,): what the metrics are means of, and the loss."""
        _check_shape(batch['input_ids'])
        inputs = {name: batch[name].flatten(0, 1) for name in ('input_ids', 'attention_mask')}
        labels = batch['labels'].flatten(0, 1)
        mask = completion_mask(labels)
        # The reference first: what FSDP gathers for the policy is then there for its backward pass.
        with torch.no_grad(), self._reference() as reference:
            reference_logits = reference(**inputs).logits[:, :-1][mask]
        logits = self.model(**inputs).logits[:, :-1][mask]
        log_probs, reference_log_probs = (
            completion_log_probs(each, labels).view(-1, 2) for each in (logits, reference_logits)
        )
        divergences = token_divergences(logits, reference_logits)
        divergence = divergences.new_zeros(mask.shape).masked_scatter(mask, divergences).sum(dim=1)
        tokens = mask.sum(dim=1).view(-1, 2)
        return {
            **self._losses_and_rewards(log_probs, log_probs - reference_log_probs, tokens),
            'divergence': divergence.view(-1, 2).sum(dim=1) / tokens.sum(dim=1).clamp(min=1),
            'tokens': tokens.sum(dim=1),
        }

    def eval_forward(self, batch: Any, outputs: Optional[Any] = None) -> dict[str, torch.Tensor]:
        return self.forward(batch) if outputs is None else outputs

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
        """Returns the mean loss of the pairs."""
        return outputs['loss'].mean()

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {name: _PairMean(name) for name in _METRICS} if self._use_train_metrics or not is_train else {}

    def update_metric(self, batch: Any, outputs: Mapping[str, torch.Tensor], metric: Metric) -> dict[str, Any]:
        assert isinstance(metric, _PairMean), 'these are the metrics that get_metrics returns'
        # A mean over tokens weighs pairs by theirs.
        weights = outputs['tokens'] if metric.name == 'ReferenceKL' else 1.0
        metric.update(outputs[_METRICS[metric.name]].detach(), weights)
        return {}

    def update_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Overwrites the reference.

        Args:
            weights (Mapping[str, torch.Tensor]): Values for the policy's tensors by their canonical names in this
                model, such as ``model.lm_head.weight``; of a sharded model those that this rank holds. What is not
                named stays.

        Raises:
            ValueError: If the policy has no tensor of a name, or a rank holds other parts of the reference than of the
                policy.
        """
        copy_to_reference(self, self._reference_names, weights)

    def _reference(self) -> contextlib.AbstractContextManager[torch.nn.Module]:
        return reference_adapter(self.model) if self.using_peft else contextlib.nullcontext(self.reference_model)

    def _losses_and_rewards(
        self, log_probs: torch.Tensor, log_ratios: torch.Tensor, tokens: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns what is known of each pair; the arguments have the shape (pairs, 2)."""
        compared = log_ratios / tokens.clamp(min=1) if self.loss_type == 'ipo' else log_ratios
        losses = preference_losses(
            *compared.unbind(dim=1), beta=self.beta, loss_type=self.loss_type, label_smoothing=self.label_smoothing
        )
        rewards = self.beta * log_ratios.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        return {
            'loss': losses,
            'accuracy': (margin > 0).float(),
            'margin': margin,
            'reward_chosen': rewards[:, 0],
            'reward_rejected': rewards[:, 1],
            'log_prob_chosen': log_probs[:, 0].detach(),
            'log_prob_rejected': log_probs[:, 1].detach(),
        }


def _check_settings(beta: float, loss_type: str, label_smoothing: float) -> None:
    require_number('beta', beta)
    require_number('label_smoothing', label_smoothing)
    if beta == 0:
        raise ValueError(f'beta must be above 0, but is {beta!r}.')
    if loss_type not in ('sigmoid', 'ipo'):
        raise ValueError(f"loss_type must be 'sigmoid' or 'ipo', but is {loss_type!r}.")
    if label_smoothing >= 0.5:
        raise ValueError(f'label_smoothing must be in [0, 0.5), but is {label_smoothing!r}.')
    if label_smoothing and loss_type == 'ipo':
        raise ValueError("label_smoothing has no meaning for loss_type='ipo': leave it out.")


def _check_shape(input_ids: torch.Tensor) -> None:
    if input_ids.dim() != 3 or input_ids.shape[1] != 2:
        raise ValueError(
            f'A batch for DPO has the shape (pairs, 2, tokens), but this one has {tuple(input_ids.shape)}: train on '
            'preference pairs, in a YAML with the loader `preference`.',
        )


def _start_reference_from_policy(model: DPO, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Completes the weights of a run that had no reference, such as supervised fine-tuning, with one.

    Raises:
        ValueError: If the reference is an adapter: weights without it are of another base, or not whole.
    """
    # Under FSDP torch has put the model's own tensors in the place of those that a file lacks.
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved = {name: value for name, value in state.items() if id(value) not in own}
    if not saved or any(prefix + reference in saved for reference in model._reference_names.values()):
        return
    if model.using_peft:
        raise ValueError(
            'The weights to load are of a run without a reference, which DPO with an adapter cannot start from: make '
            'a folder of them with `composer-bema export`, and build the model from that.',
        )
    references = {policy: reference for policy, reference in model._reference_names.items() if prefix + policy in saved}
    state.update({prefix + reference: saved[prefix + policy] for policy, reference in references.items()})
