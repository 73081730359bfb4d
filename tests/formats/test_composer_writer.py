# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of a model alone: what is said where they cannot be written."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from composer_bema.formats.composer_writer import ComposerWriter
from composer_bema.formats.tensors import TensorSpec


def test_an_error_of_writing_names_the_file(tmp_path):
    """Of a full disk torch makes a `RuntimeError` about positions in its archive."""
    like = SimpleNamespace(path=Path('ep0-ba4-rank0.pt'), timestamp=None, huggingface=None)
    writer = ComposerWriter(tmp_path, like, {'a': TensorSpec(torch.Size([1000]), torch.float32)}, 'BEMA')
    writer.create()
    writer.write('a', 0, torch.ones(1000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"^'{tmp_path}/ep0-ba4-rank0\.pt' cannot be written, which may be for want"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.close()
