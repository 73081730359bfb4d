# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Texts to evaluate a model on outside a run: files, or what a run trains on and is evaluated on."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import TrainConfig
from composer_bema.training.data.sections import build_loader, eval_sections
from composer_bema.training.data.text_files import build_text_files

__all__ = ['Texts', 'texts_of_files', 'texts_of_run']

# Returns batches, which can be gone through again and again, by the names of the texts.
Texts = Callable[[PreTrainedTokenizerBase], Mapping[str, Iterable[Mapping[str, Any]]]]


class FirstBatches:
    """The first batches of a loader, the same each time that they are gone through.

    Args:
        loader: The loader.
        count: How many, which are kept in memory; None for all.
    """

    def __init__(self, loader: Iterable[Mapping[str, Any]], count: int | None) -> None:
        self.loader = loader
        self.count = count
        self.kept: list[Mapping[str, Any]] | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self.count is None:
            return iter(self.loader)
        if self.kept is None:
            # A streaming loader that shuffles begins with others the next time.
            self.kept = list(itertools.islice(self.loader, self.count))
        return iter(self.kept)


def texts_of_files(
    files: Mapping[str, Sequence[str]], max_seq_len: int, batch_size: int, batches: int | None = None
) -> Texts:
    """Text and JSONL files, joined and cut into blocks.

    Args:
        files: Paths or glob patterns by the texts' names.
        max_seq_len: Tokens in a block.
        batch_size: Blocks in a batch.
        batches: Of each text only the first so many; None for all.
    """

    def build(tokenizer: PreTrainedTokenizerBase) -> dict[str, Iterable[Mapping[str, Any]]]:
        texts = {}
        for name, paths in files.items():
            source = build_text_files(tokenizer, max_seq_len, paths, part='all')
            loader = DataLoader(source.dataset, batch_size=batch_size, collate_fn=source.collate)
            texts[name] = FirstBatches(loader, batches)
        return texts

    return build


def texts_of_run(config: TrainConfig, batch_size: int, batches: int | None = None) -> Texts:
    """The training text of a run, and those of its evaluators; evaluators of the same text count once.

    Args:
        config: The settings of the run.
        batch_size: Rows in a batch.
        batches: Of each text only the first so many; None for all.
    """

    def build(tokenizer: PreTrainedTokenizerBase) -> dict[str, Iterable[Mapping[str, Any]]]:
        held_out = {}
        for label, (path, section) in eval_sections(config.eval_loader).items():
            held_out.setdefault(json.dumps(section, sort_keys=True), (label, path, section))
        sections = [('train', 'train_loader', config.train_loader), *held_out.values()]
        if len(held_out) == 1:
            sections[1] = ('held_out', *sections[1][1:])
        return {
            name: FirstBatches(
                build_loader(section, path, tokenizer, config.max_seq_len, batch_size).dataloader, batches
            )
            for name, path, section in sections
        }

    return build
