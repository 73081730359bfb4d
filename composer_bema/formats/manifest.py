# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The file beside written weights that says which they are and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from composer_bema.formats.safetensors_files import write_json
from composer_bema.version import __version__

__all__ = ['MANIFEST', 'WEIGHTS', 'read_manifest', 'write_manifest']

MANIFEST = 'averaging.json'

# The key for what the weights are: the class of an average, or 'training'.
WEIGHTS = 'weights'


def write_manifest(folder: Path, weights: str, content: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder.

    Args:
        folder (Path): Where the weights are.
        weights (str): What they are: the class of an average, or ``'training'``.
        content (Mapping[str, Any]): How they were made; plain values.
    """
    write_json(folder / MANIFEST, {WEIGHTS: weights, 'composer_bema': __version__, **content})


def read_manifest(folder: Path) -> Optional[dict[str, Any]]:
    """Returns what :func:`write_manifest` has written, or None if there is nothing.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content[WEIGHTS], str):
            raise TypeError(WEIGHTS)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{path}' is damaged: it does not say which weights are beside it.") from error
    return content
