# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A dataset as the Composer DataSpec of a loader: sampling, batching, padding and the counting of tokens."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

__all__ = ['IGNORED_LABEL', 'DataSource', 'build_data_spec', 'count_tokens', 'pad_batch', 'padding_token']

# Cross entropy leaves targets of this value out (torch's and transformers' convention).
IGNORED_LABEL = -100

Sample = Mapping[str, torch.Tensor]


def count_tokens(batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Tokens of a batch without padding (Composer's clock), and those that the loss is a mean over."""
    # Packed batches carry no attention mask, but say which document each token belongs to, -1 for padding.
    is_token = batch['sequence_id'] >= 0 if 'sequence_id' in batch else batch['attention_mask']
    # The first label of a row has no token before it to be predicted from.
    is_target = batch['labels'][:, 1:] != IGNORED_LABEL
    return {'total': int(is_token.sum()), 'loss_generating': int(is_target.sum())}


class DataSource(NamedTuple):
    """What the builder of a loader returns."""

    dataset: Dataset
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    """Makes a batch of samples."""
    shuffle: bool
    """Whether to visit a map-style dataset in a new order each epoch; a streaming one sees to that itself."""
    shuffle_seed: int
    count_tokens: Callable[[Mapping[str, torch.Tensor]], dict[str, int]] = count_tokens
    """What Composer's clock counts in a batch, ``total``, and what its loss is a mean over, ``loss_generating``."""


def build_data_spec(
    source: DataSource,
    batch_size: int,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: Optional[int] = None,
    persistent_workers: bool = False,
    timeout: float = 0,
) -> DataSpec:
    """Put a dataset behind a DataLoader of ``batch_size`` samples a device; its options are the other arguments.

    Raises:
        ValueError: ``drop_last`` leaves nothing of a dataset smaller than a batch; Composer would wait for ever.
    """
    sampler = None
    if not isinstance(source.dataset, IterableDataset):
        # Composer calls set_epoch on this sampler and skips what an interrupted epoch has seen: the order of the
        # batches depends on seed and epoch alone, also after a resume.
        sampler = dist.get_sampler(
            source.dataset,
            drop_last=drop_last,
            shuffle=source.shuffle,
            seed=source.shuffle_seed,
        )
    loader = DataLoader(
        source.dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=source.collate,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        timeout=timeout,
    )
    if not len(loader):
        raise ValueError(
            f'drop_last drops the only batch: the data set holds fewer than {batch_size} samples for each device.',
        )
    return DataSpec(loader, split_batch=split_batch, get_num_tokens_in_batch=source.count_tokens)


def split_batch(batch: Mapping[str, torch.Tensor], size: int | float) -> list[dict[str, torch.Tensor]]:
    """Cut a batch into microbatches of at most ``size`` rows (Composer's own warns about a short last batch)."""
    pieces = {key: value.split(int(size)) for key, value in batch.items()}
    return [dict(zip(pieces, values, strict=False)) for values in zip(*pieces.values(), strict=False)]


def pad_to_longest(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch ``input_ids`` and ``labels`` of different lengths: padding on the right, masked and no target."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        'input_ids': pad([s['input_ids'] for s in samples], padding_value=pad_token_id),
        'attention_mask': pad([torch.ones_like(s['input_ids']) for s in samples], padding_value=0),
        'labels': pad([s['labels'] for s in samples], padding_value=IGNORED_LABEL),
    }


def pad_batch(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Sample]], dict[str, torch.Tensor]]:
    """:func:`pad_to_longest` with a tokenizer's padding token."""
    return functools.partial(pad_to_longest, pad_token_id=padding_token(tokenizer))


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: padding is masked and no target, so that any serves where the tokenizer has none."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
