# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Folders of models with code of their own, which leaves a mark if it is run."""

import json
from pathlib import Path


def with_configuration(folder: Path, mark: Path) -> Path:
    """Makes a folder of a model whose configuration is a class in a file beside it."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({'model_type': 'unheard', 'auto_map': {'AutoConfig': 'own.Own'}}))
    code = "from transformers import PretrainedConfig\nclass Own(PretrainedConfig):\n    model_type = 'unheard'\n"
    (folder / 'own.py').write_text(_leaving(mark) + code)
    return folder


def with_generation(folder: Path, mark: Path) -> Path:
    """Puts a way of generating of its own into the folder of a model."""
    (folder / 'custom_generate').mkdir()
    code = 'def generate(*args, **kwargs): pass\n'
    (folder / 'custom_generate' / 'generate.py').write_text(_leaving(mark) + code)
    return folder


def _leaving(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\n"
