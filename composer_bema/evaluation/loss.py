# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Loss, perplexity and token accuracy of a language model on texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from composer_bema.evaluation.measurements import Measurement, mean_over

__all__ = ['IGNORED', 'LOSS', 'measure_loss']

# What the task is called, and with which the names of its texts begin in results.
LOSS = 'loss'

# The label of a token that is not predicted, in torch and transformers.
IGNORED = -100
_INPUTS = ('input_ids', 'attention_mask', 'position_ids')


@torch.no_grad()
def measure_loss(task: str, model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[Measurement]:
    """Returns the mean loss in nats a token, its exponential, and the part of the tokens that the model ranks first.

    Every predicted token weighs the same; the standard errors are those over rows, whose tokens depend on each other.

    Args:
        task (str): What the measurements are called.
        model (PreTrainedModel): The model, which is put into evaluation mode.
        batches (Iterable[Mapping[str, Tensor]]): ``input_ids`` and ``labels``, int64 of the shape (rows, tokens), of
            which ``labels`` are -100 where nothing is predicted; and optionally ``attention_mask`` and
            ``position_ids``.

    Raises:
        ValueError: If there is no token to predict.
    """
    model.eval()
    losses: list[float] = []
    hits: list[float] = []
    counts: list[float] = []
    context = getattr(model.config, 'max_position_embeddings', None)
    for batch in batches:
        shape = batch['input_ids'].shape
        if len(shape) != 2:
            raise ValueError(f'{task} has no rows of tokens, but batches of the shape {tuple(shape)}: name a text.')
        if context and shape[1] > context:
            raise ValueError(f'{task} has rows of {shape[1]} tokens, and the context of the model {context}: cut it.')
        inputs = {name: batch[name].to(model.device) for name in _INPUTS if name in batch}
        targets = batch['labels'][:, 1:].to(model.device)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction='none')
        losses += loss.view(targets.shape).double().sum(1).tolist()
        hits += (logits.argmax(-1) == targets).sum(1).tolist()
        counts += (targets != IGNORED).sum(1).tolist()
    if not sum(counts):
        raise ValueError(f'{task} has no token to predict: give it a longer text.')
    mean = _ratio(task, 'loss', losses, counts)
    # exp overflows a float above 709.
    perplexity = math.exp(mean.value) if mean.value < 709 else math.inf
    error = None if mean.standard_error is None else perplexity * mean.standard_error
    return [
        mean,
        Measurement(task, 'perplexity', perplexity, error, mean.count),
        _ratio(task, 'token accuracy', hits, counts),
    ]


def _ratio(task: str, metric: str, sums: list[float], counts: list[float]) -> Measurement:
    """Returns a mean over tokens, with the standard error of a ratio of two sums over rows."""
    value = math.fsum(sums) / sum(counts)
    size = sum(counts) / len(counts)
    linear = mean_over(
        task, metric, [(total - value * count) / size for total, count in zip(sums, counts, strict=True)]
    )
    return Measurement(task, metric, value, linear.standard_error, len(counts))
