# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Preference pairs for DPO: a Hugging Face dataset whose rows hold a chosen and a rejected completion of a prompt."""

import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import datasets
import jinja2
import torch
from composer.utils import dist
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import Part, select_part
from composer_bema.training.data.hf_rows import load_rows
from composer_bema.training.data.loaders import IGNORED_LABEL, DataSource, pad_to_longest, padding_token
from composer_bema.training.data.pairs import (
    CHOSEN,
    PROMPT,
    REJECTED,
    Completion,
    cut_pair,
    encode_pair,
    special_tokens,
    split_pair,
)

__all__ = ['PreferencePairs', 'build_preference', 'collate_pairs', 'count_pairs', 'pairs_source']

log = logging.getLogger(__name__)

# The map's processes would each infer these from their own rows.
FEATURES = datasets.Features(
    {
        'chosen': datasets.Sequence(datasets.Value('int64')),
        'chosen_start': datasets.Value('int64'),
        'rejected': datasets.Sequence(datasets.Value('int64')),
        'rejected_start': datasets.Value('int64'),
        'is_empty': datasets.Value('bool'),
        'is_equal': datasets.Value('bool'),
        'cut_prompt': datasets.Value('bool'),
        'cut_completion': datasets.Value('bool'),
    }
)


def build_preference(
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    hf_name: str,
    split: str = 'train',
    hf_kwargs: Optional[Mapping[str, Any]] = None,
    part: Part = 'train',
    train_fraction: float = 0.99,
    split_seed: int = 17,
    max_prompt_len: Optional[int] = None,
    num_proc: Optional[int] = None,
    shuffle: bool = False,
    shuffle_seed: int = 17,
) -> DataSource:
    """Tokenized pairs of completions; batch sizes count pairs.

    The columns ``chosen`` and ``rejected`` hold two texts or two lists of messages, and ``prompt`` what they answer:

    - texts with a text as the prompt; without one the beginning that both share is the prompt, in whole words. The
      tokenizer's end-of-text token ends a completion, and its first special token opens a prompt, where it has them;
    - lists of messages with a list of messages as the prompt, which they may repeat; without one, or with one that is a
      text, the messages that both share at their beginning are the prompt. Where they share none, or begin with the
      assistant, a prompt that is a text is the user's message. A text behind a list of messages is the assistant's.

    Everything behind the prompt is a target.

    Args:
        tokenizer: Must have a chat template for messages (``tokenizer.kwargs.chat_template`` gives it one).
        max_seq_len: Prompt and completion are cut to this together, in tokens.
        hf_name: A dataset on the hub, a local folder, or ``json`` with ``hf_kwargs: {data_files: ...}``.
        split: The dataset's own split to read.
        hf_kwargs: More arguments of ``datasets.load_dataset``.
        part: The training or the held-out pairs of that split.
        train_fraction: Share of the pairs in the training part.
        split_seed: Seed of the choice of held-out pairs.
        max_prompt_len: How many of its last tokens a prompt keeps at least when a pair is cut; None is half of
            ``max_seq_len``.
        num_proc: Processes that tokenize.
        shuffle: Visit the pairs in a new order each epoch.
        shuffle_seed: Seed of that order.
    """
    max_prompt_len = _prompt_len(max_seq_len, max_prompt_len)
    # One rank of each node tokenizes and the others read its cache.
    with dist.run_local_rank_zero_first():
        rows = load_rows(hf_name, split, hf_kwargs or {}, [CHOSEN, REJECTED])
        rows = rows.select_columns([name for name in (PROMPT, CHOSEN, REJECTED) if name in rows.column_names])
        rows = rows.select(select_part(len(rows), part, train_fraction, split_seed))
        encoded = encode_rows(rows, tokenizer, max_seq_len, max_prompt_len, num_proc)
    return pairs_source(encoded, tokenizer, shuffle, shuffle_seed)


class PreferencePairs(Dataset):
    """Tokenized pairs: the tokens of each side, and its labels, which leave the prompt out."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        sample = {}
        for side in (CHOSEN, REJECTED):
            tokens = torch.tensor(row[side])
            is_target = torch.arange(len(tokens)) >= row[f'{side}_start']
            sample[f'{side}_input_ids'] = tokens
            sample[f'{side}_labels'] = tokens.where(is_target, IGNORED_LABEL)
        return sample


def collate_pairs(samples: Sequence[Mapping[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch pairs as tensors of shape (pairs, 2, tokens), the chosen side first, with padding on the right.

    A pair is one row, so that cutting a batch into microbatches keeps it together.
    """
    sides = [
        {name: sample[f'{side}_{name}'] for name in ('input_ids', 'labels')}
        for sample in samples
        for side in (CHOSEN, REJECTED)
    ]
    return {name: rows.unflatten(0, (-1, 2)) for name, rows in pad_to_longest(sides, pad_token_id).items()}


def count_pairs(batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Tokens of a batch without padding (Composer's clock), and its pairs, which the loss of DPO is a mean over."""
    return {'total': int(batch['attention_mask'].sum()), 'loss_generating': len(batch['input_ids'])}


def pairs_source(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    shuffle: bool,
    shuffle_seed: int,
) -> DataSource:
    """What a loader of pairs returns, given its rows from :func:`encode_rows`."""
    collate = functools.partial(collate_pairs, pad_token_id=padding_token(tokenizer))
    return DataSource(PreferencePairs(rows), collate, shuffle, shuffle_seed, count_pairs)


def encode_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    max_prompt_len: Optional[int] = None,
    num_proc: Optional[int] = None,
) -> datasets.Dataset:
    """Tokenize rows of ``chosen``, ``rejected`` and perhaps ``prompt``, cut them, and drop what teaches nothing."""
    max_prompt_len = _prompt_len(max_seq_len, max_prompt_len)
    front, end = special_tokens(tokenizer)
    encode = functools.partial(
        _encode,
        tokenizer=tokenizer,
        front=front,
        end=end,
        max_seq_len=max_seq_len,
        max_prompt_len=max_prompt_len,
    )
    columns = rows.column_names
    encoded = rows.map(encode, remove_columns=columns, features=FEATURES, num_proc=num_proc, desc='Tokenizing')
    return _drop(encoded, max_seq_len, max_prompt_len)


def _prompt_len(max_seq_len: int, max_prompt_len: Optional[int]) -> int:
    if max_seq_len < 2:
        raise ConfigError(f'max_seq_len must be at least 2 tokens, one to read and one to predict, not {max_seq_len}.')
    if max_prompt_len is None:
        return max_seq_len // 2
    if not 1 <= max_prompt_len < max_seq_len:
        raise ConfigError(
            f'max_prompt_len must lie between 1 and {max_seq_len - 1} tokens, less than max_seq_len={max_seq_len}, '
            f'not {max_prompt_len}.'
        )
    return max_prompt_len


def _encode(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    front: list[int],
    end: list[int],
    max_seq_len: int,
    max_prompt_len: int,
) -> dict[str, Any]:
    try:
        pair = split_pair(row)
        whole = encode_pair(tokenizer, pair, front, end)
    except (ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise ConfigError(f'{" ".join(str(error).split())} (in the pair that begins {str(dict(row))[:80]})') from error
    chosen, rejected = kept = cut_pair(*whole, max_seq_len, max_prompt_len)
    return {
        'chosen': chosen.tokens,
        'chosen_start': chosen.start,
        'rejected': rejected.tokens,
        'rejected_start': rejected.start,
        'is_empty': pair.has_blank_side or not (chosen.has_target and rejected.has_target),
        'is_equal': pair.chosen == pair.rejected or chosen.tokens == rejected.tokens,
        'cut_prompt': any(after.start < before.start for before, after in zip(whole, kept, strict=True)),
        'cut_completion': any(
            _reply_len(after) < _reply_len(before) for before, after in zip(whole, kept, strict=True)
        ),
    }


def _reply_len(side: Completion) -> int:
    return len(side.tokens) - side.start


def _drop(rows: datasets.Dataset, max_seq_len: int, max_prompt_len: int) -> datasets.Dataset:
    """Leave out the pairs without a target and those of two equal sides, between which nothing can be learned."""
    empty, equal = rows['is_empty'], rows['is_equal']
    keep = [i for i in range(len(rows)) if not empty[i] and not equal[i]]
    if not keep:
        raise ConfigError(f'none of the {len(rows)} pairs is left, all have an empty completion or two equal ones.')
    kept = rows.select(keep)
    no_target, cut_prompt, cut_completion = sum(empty), sum(kept['cut_prompt']), sum(kept['cut_completion'])
    report = (
        f'Kept {len(kept)} of {len(rows)} pairs: {no_target} have an empty completion, '
        f'{len(rows) - len(kept) - no_target} others two equal ones; of the kept, {cut_prompt} have a cut prompt and '
        f'{cut_completion} a cut completion (max_seq_len={max_seq_len}, max_prompt_len={max_prompt_len}).'
    )
    log.info(report)
    if len(kept) < len(rows) or cut_prompt or cut_completion:
        warnings.warn(report, stacklevel=2)
    return kept
