# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Several short conversations in one row, none seeing another, so that little of a batch is padding."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from composer_bema.training.config import ConfigError
from composer_bema.training.data.loaders import IGNORED_LABEL

__all__ = ['PackedRows', 'best_fit', 'check_packing', 'collate_packed', 'keeps_documents_apart']


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few rows as is cheap: longest first, each into the fullest row that still holds it.

    Args:
        lengths: Length of each item, at most ``capacity``.
        capacity: Length of a row.

    Returns:
        For each row the indices of its items. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of rows_by_space, ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(spaces, lengths[item])
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[row].append(item)
        left = space - lengths[item]
        if left not in rows_by_space:
            rows_by_space[left] = []
            bisect.insort(spaces, left)
        rows_by_space[left].append(row)
    return rows


class PackedRows(Dataset):
    """Rows of samples of another dataset.

    Args:
        dataset: Where the samples come from.
        rows: For each row the indices of its samples.
    """

    def __init__(self, dataset: Dataset, rows: Sequence[Sequence[int]]) -> None:
        self.dataset = dataset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, torch.Tensor]]:
        return [self.dataset[item] for item in self.rows[index]]


def collate_packed(
    rows: Sequence[Sequence[Mapping[str, torch.Tensor]]],
    max_seq_len: int,
    pad_token_id: int,
) -> dict[str, torch.Tensor]:
    """Batch rows of samples, each row ``max_seq_len`` tokens long.

    There is no attention mask: transformers keep documents apart where ``position_ids`` start again, and take a mask
    for leave to attend across (see :func:`keeps_documents_apart`). ``sequence_id`` counts the documents of a row, -1
    for padding; models do not see it.
    """
    shape = (len(rows), max_seq_len)
    batch = {
        'input_ids': torch.full(shape, pad_token_id),
        'labels': torch.full(shape, IGNORED_LABEL),
        'position_ids': torch.zeros(shape, dtype=torch.long),
        'sequence_id': torch.full(shape, -1),
    }
    for row, samples in enumerate(rows):
        start = 0
        for document, sample in enumerate(samples):
            stop = start + len(sample['input_ids'])
            batch['input_ids'][row, start:stop] = sample['input_ids']
            batch['labels'][row, start:stop] = sample['labels']
            # Nothing in the document before predicts a document's first token.
            batch['labels'][row, start] = IGNORED_LABEL
            batch['position_ids'][row, start:stop] = torch.arange(stop - start)
            batch['sequence_id'][row, start:stop] = document
            start = stop
        # Padding counts on as one more document; position 0 throughout would make each padding token its own.
        batch['position_ids'][row, start:] = torch.arange(max_seq_len - start)
    return batch


def check_packing(model: torch.nn.Module, path: str) -> None:
    """Check that a model reads packed conversations one by one.

    Args:
        model: A transformers model, with an adapter or without.
        path: Where the settings ask for packing.

    Raises:
        ConfigError: It reads across them.
    """
    # flash_attention_2 always separates, and does not run on the CPU, where a model is at first.
    config: Any = model.config
    is_flash = config._attn_implementation == 'flash_attention_2'
    if not is_flash and not keeps_documents_apart(model):
        raise ConfigError(
            f'{path}: {type(model).__name__} lets packed conversations see each other with transformers '
            f'{transformers.__version__}; use packing: false.',
        )


@torch.no_grad()
def keeps_documents_apart(model: torch.nn.Module) -> bool:
    """Whether a transformers model's outputs for one document of a packed row ignore the document before.

    Older releases of transformers, and some of its models, use ``position_ids`` for the positions alone; nothing but a
    trial tells. The trial is two forward passes of four tokens, on whatever device the model is, and without a cache,
    with which transformers does not keep documents apart.
    """
    device = next(model.parameters()).device
    position_ids = torch.tensor([[0, 1, 0, 1]], device=device)
    was_training = model.training
    model.eval()
    try:
        logits = [
            model(
                input_ids=torch.tensor([[*first, 1, 2]], device=device), position_ids=position_ids, use_cache=False
            ).logits[:, 2:]
            for first in ((3, 4), (5, 6))
        ]
    finally:
        model.train(was_training)
    return torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)
