# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Local text and JSONL files, read whole into memory; for what does not fit there is ``composer-bema convert``."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union

from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import Part, block_dataset
from composer_bema.training.data.loaders import DataSource, pad_batch

__all__ = ['build_text_files', 'find_files', 'read_rows', 'read_texts']


def build_text_files(
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    paths: Union[str, Sequence[str]],
    text_field: str = 'text',
    part: Part = 'train',
    train_fraction: float = 0.99,
    split_seed: int = 17,
    shuffle: bool = False,
    shuffle_seed: int = 17,
) -> DataSource:
    """Blocks of ``max_seq_len`` tokens of local files.

    Args:
        tokenizer: Makes the tokens.
        max_seq_len: Tokens in a block.
        paths: Files or glob patterns; ``.jsonl`` holds a JSON object with a text in each line, another file is a text.
        text_field: The name of the text in those objects.
        part: The training or the held-out blocks.
        train_fraction: Share of the blocks in the training part.
        split_seed: Seed of the choice of held-out blocks.
        shuffle: Visit the blocks in a new order each epoch.
        shuffle_seed: Seed of that order.
    """
    files = find_files([paths] if isinstance(paths, str) else paths)
    blocks = block_dataset(read_texts(files, text_field), tokenizer, max_seq_len, part, train_fraction, split_seed)
    return DataSource(blocks, pad_batch(tokenizer), shuffle, shuffle_seed)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that match the patterns, in the patterns' order, each pattern's own in alphabetical order."""
    files = []
    for pattern in patterns:
        matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not matches:
            raise ConfigError(f"No file matches '{pattern}'.")
        files += matches
    return files


def read_texts(files: Sequence[Path], text_field: str = 'text') -> Iterator[str]:
    """The texts of the files, one after another.

    Raises:
        ConfigError: Names the file and line that is not UTF-8, not JSON, or has no such field.
    """
    for file in files:
        try:
            if file.suffix == '.jsonl':
                yield from _read_jsonl(file, text_field)
            else:
                yield file.read_text(encoding='utf-8')
        except UnicodeDecodeError as error:
            raise ConfigError(f"'{file}' is not UTF-8 text (byte {error.start}).") from error


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    for number, row in read_rows(file):
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"'{file}', line {number}, has no text under '{text_field}'.")
        yield text


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The values in the lines of a JSONL file, each with the number of its line.

    Raises:
        ConfigError: Names the file and line that is not JSON.
    """
    with file.open(encoding='utf-8') as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"'{file}', line {number}, is not JSON: {error.msg}.") from error
