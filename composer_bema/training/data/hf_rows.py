# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of a Hugging Face dataset, with errors that say what is wrong with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from composer_bema.training.config import ConfigError
from composer_bema.training.data.text_files import read_rows

__all__ = ['load_rows']


def load_rows(hf_name: str, split: str, hf_kwargs: Mapping[str, Any], columns: Sequence[str]) -> datasets.Dataset:
    """One split of a dataset.

    Args:
        hf_name: A dataset on the hub, a local folder, or ``json`` with ``hf_kwargs: {data_files: ...}``.
        split: The dataset's own split to read.
        hf_kwargs: More arguments of ``datasets.load_dataset``.
        columns: What it must have.

    Raises:
        ConfigError: It cannot be loaded, or has no such column.
    """
    try:
        rows = datasets.load_dataset(hf_name, split=split, **hf_kwargs)
    except Exception as error:
        # datasets raises whatever its many readers raise; all of it means that there is nothing to train on.
        _find_broken_line(hf_kwargs.get('data_files'))
        # Where it says no more than that it failed, what it failed on is in the cause.
        reason = str(error.__cause__ or error).split('\n', maxsplit=1)[0] or 'nothing is there'
        raise ConfigError(f"hf_name: cannot load split '{split}' of '{hf_name}' ({reason})") from error
    assert isinstance(rows, datasets.Dataset)
    for column in columns:
        if column not in rows.column_names:
            raise ConfigError(f"hf_name: '{hf_name}' has no '{column}' column, only {', '.join(rows.column_names)}.")
    return rows


def _find_broken_line(data_files: Any) -> None:
    """Raise a ConfigError for the first line that is not JSON; datasets names neither the file nor its line."""
    names = [data_files] if isinstance(data_files, str) else data_files if isinstance(data_files, list) else []
    for path in map(Path, names):
        if path.suffix == '.jsonl' and path.is_file():
            for _ in read_rows(path):
                pass
