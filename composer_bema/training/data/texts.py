# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Texts to evaluate a model on outside a run: files, or what a run trains on and is evaluated on."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_bema.flops import context_length
from composer_bema.training.config import ConfigError, TrainConfig
from composer_bema.training.data.packing import check_packing
from composer_bema.training.data.sections import build_loader, check_loader, eval_sections
from composer_bema.training.data.text_files import build_text_files
from composer_bema.training.registry import ON_PAIRS

__all__ = ['RunTexts', 'TextFiles']

# Tokens in a block of a file, where nothing says otherwise and the context of the model is not shorter.
BLOCK = 1024

Batches = Iterable[Mapping[str, Any]]


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


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text and JSONL files, joined and cut into blocks."""

    files: Mapping[str, Sequence[str]]
    """Paths or glob patterns by the texts' names."""
    max_seq_len: int | None
    """Tokens in a block; None for 1024, or the context of the model if that is shorter."""
    batch_size: int
    """Blocks in a batch."""
    batches: int | None = None
    """Of each text only the first so many; None for all."""

    @property
    def given(self) -> dict[str, Any]:
        """What they are, as plain values."""
        return dataclasses.asdict(self)

    def __call__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Batches]:
        """Batches by the texts' names, which can be gone through again and again."""
        length = self.max_seq_len or min(BLOCK, context_length(model.config.to_dict()) or BLOCK)
        texts: dict[str, Batches] = {}
        for name, paths in self.files.items():
            source = build_text_files(tokenizer, length, paths, part='all')
            loader = DataLoader(source.dataset, batch_size=self.batch_size, collate_fn=source.collate)
            texts[name] = FirstBatches(loader, self.batches)
        return texts


class RunTexts:
    """The training text of a run, and those of its evaluators; evaluators of the same text count once.

    Args:
        config: The settings of the run.
        batch_size: Rows in a batch.
        batches: Of each text only the first so many; None for all.

    Raises:
        ConfigError: A loader makes preference pairs.
    """

    def __init__(self, config: TrainConfig, batch_size: int, batches: int | None = None) -> None:
        self.max_seq_len = config.max_seq_len
        self.batch_size = batch_size
        self.batches = batches
        self.sections = _sections(config)

    @property
    def given(self) -> dict[str, Any]:
        """What they are, as plain values: the sections of the run's settings."""
        loaders = {name: section for name, (_, section) in self.sections.items()}
        return {'loaders': loaders, 'max_seq_len': self.max_seq_len, 'batches': self.batches}

    def __call__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Batches]:
        """Batches by the texts' names, which can be gone through again and again.

        Raises:
            ConfigError: A loader packs conversations, which the model does not keep apart.
        """
        packed = next((path for path, section in self.sections.values() if section['dataset'].get('packing')), None)
        if packed is not None:
            check_packing(model, f'{packed}.dataset.packing')
        return {
            name: FirstBatches(
                build_loader(section, path, tokenizer, self.max_seq_len, self.batch_size).dataloader, self.batches
            )
            for name, (path, section) in self.sections.items()
        }


def _sections(config: TrainConfig) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The dotted keys and contents of the sections with a run's texts, by the names of these."""
    held_out = {}
    for label, (path, section) in eval_sections(config.eval_loader).items():
        held_out.setdefault(json.dumps(section, sort_keys=True), (label, path, section))
    sections = [('train', 'train_loader', config.train_loader), *held_out.values()]
    if len(held_out) == 1:
        sections[1] = ('held_out', *sections[1][1:])
    for _, path, section in sections:
        check_loader(section, path, config.max_seq_len)
        if section['name'] in ON_PAIRS['loader']:
            raise ConfigError(
                f"{path}.name: {section['name']} makes preference pairs, which are no texts for 'loss': name files "
                'with --text NAME=FILE, or with --run a run on texts.'
            )
    return {name: (path, section) for name, path, section in sections}
