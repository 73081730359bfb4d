# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Conversations for supervised fine-tuning: a Hugging Face dataset with a ``messages`` column, and a chat template."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional

import datasets
import jinja2
import torch
from composer.utils import dist
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import Part, select_part
from composer_bema.training.data.chat import Span, check_messages, tokenize_chat
from composer_bema.training.data.hf_rows import load_rows
from composer_bema.training.data.loaders import IGNORED_LABEL, DataSource, pad_batch, padding_token
from composer_bema.training.data.packing import PackedRows, best_fit, collate_packed

__all__ = ['build_finetuning', 'target_mask']

log = logging.getLogger(__name__)

MESSAGES = 'messages'


def build_finetuning(
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    hf_name: str,
    split: str = 'train',
    hf_kwargs: Optional[Mapping[str, Any]] = None,
    part: Part = 'train',
    train_fraction: float = 0.99,
    split_seed: int = 17,
    max_tokens: Optional[int] = None,
    target_responses: Literal['all', 'last'] = 'all',
    target_prompts: Literal['none', 'all'] = 'none',
    packing: bool = False,
    num_proc: Optional[int] = None,
    shuffle: bool = False,
    shuffle_seed: int = 17,
) -> DataSource:
    """Tokenized conversations with their targets.

    Args:
        tokenizer: Must have a chat template (``tokenizer.kwargs.chat_template`` gives it one).
        max_seq_len: Longer conversations are cut here, in tokens.
        hf_name: A dataset on the hub, a local folder, or ``json`` with ``hf_kwargs: {data_files: ...}``.
        split: The dataset's own split to read.
        hf_kwargs: More arguments of ``datasets.load_dataset``.
        part: The training or the held-out conversations of that split.
        train_fraction: Share of the conversations in the training part.
        split_seed: Seed of the choice of held-out conversations.
        max_tokens: Drop conversations of more tokens than this instead of cutting them; None keeps all.
        target_responses: Train on all of the assistant's turns or on the last one.
        target_prompts: ``all`` makes every token a target.
        packing: Join conversations into rows of ``max_seq_len`` tokens; batch sizes then count rows.
        num_proc: Processes that tokenize.
        shuffle: Visit the conversations in a new order each epoch.
        shuffle_seed: Seed of that order.
    """
    for name, value, known in (
        ('target_responses', target_responses, ('all', 'last')),
        ('target_prompts', target_prompts, ('none', 'all')),
    ):
        if value not in known:
            raise ConfigError(f'{name} must be one of {", ".join(known)}, not {value!r}.')
    # One rank of each node tokenizes and the others read its cache.
    with dist.run_local_rank_zero_first():
        rows = load_rows(hf_name, split, hf_kwargs or {}, [MESSAGES])
        rows = rows.select(select_part(len(rows), part, train_fraction, split_seed))
        encode = functools.partial(
            _encode,
            tokenizer=tokenizer,
            max_seq_len=max_seq_len,
            target_responses=target_responses,
            target_prompts=target_prompts,
        )
        rows = rows.map(encode, remove_columns=rows.column_names, num_proc=num_proc, desc='Tokenizing')
    conversations = Conversations(_drop(rows, max_tokens))
    if not packing:
        return DataSource(conversations, pad_batch(tokenizer), shuffle, shuffle_seed)
    lengths = [min(length, max_seq_len) for length in conversations.rows['length']]
    packed = PackedRows(conversations, best_fit(lengths, max_seq_len))
    log.info('Packed %d conversations into %d rows of %d tokens.', len(conversations), len(packed), max_seq_len)
    collate = functools.partial(collate_packed, max_seq_len=max_seq_len, pad_token_id=padding_token(tokenizer))
    return DataSource(packed, collate, shuffle, shuffle_seed)


class Conversations(Dataset):
    """Tokenized conversations; ``target`` marks the tokens to train on."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        tokens = torch.tensor(row['input_ids'])
        return {'input_ids': tokens, 'labels': tokens.where(torch.tensor(row['target']), IGNORED_LABEL)}


def _encode(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    target_responses: str,
    target_prompts: str,
) -> dict[str, Any]:
    try:
        check_messages(row[MESSAGES])
        tokens, turns = tokenize_chat(tokenizer, row[MESSAGES])
    except (ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise ConfigError(
            f'{" ".join(str(error).split())} (in the conversation that begins {str(row[MESSAGES])[:80]})'
        ) from error
    target = target_mask(len(tokens), turns, target_responses, target_prompts)
    return {'input_ids': tokens[:max_seq_len], 'target': target[:max_seq_len], 'length': len(tokens)}


def target_mask(length: int, turns: Sequence[Span], target_responses: str, target_prompts: str) -> list[bool]:
    """Which of ``length`` tokens are targets, given the ranges that are the assistant's turns."""
    if target_prompts == 'all':
        return [True] * length
    mask = [False] * length
    for start, stop in turns[-1:] if target_responses == 'last' else turns:
        mask[start:stop] = [True] * (stop - start)
    return mask


def _drop(rows: datasets.Dataset, max_tokens: Optional[int]) -> datasets.Dataset:
    """Leave out what is longer than ``max_tokens``, and what has no target: its mean loss would be 0 / 0."""
    too_long = [max_tokens is not None and length > max_tokens for length in rows['length']]
    # The first token of a row is never predicted.
    empty = [not any(target[1:]) for target in rows['target']]
    keep = [i for i in range(len(rows)) if not too_long[i] and not empty[i]]
    log.info(
        'Kept %d of %d conversations: %d are longer than max_tokens=%s, %d others have no target.',
        len(keep),
        len(rows),
        sum(too_long),
        max_tokens,
        len(rows) - len(keep) - sum(too_long),
    )
    if not keep:
        raise ConfigError(f'none of the {len(rows)} conversations is left (max_tokens={max_tokens}).')
    return rows.select(keep)
