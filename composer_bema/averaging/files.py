# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tensors that are kept on disk: files mapped into memory, which the system reads and writes as they are used."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

__all__ = ['copy_in_file']


def copy_in_file(tensor: torch.Tensor, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """Returns a copy on disk, which can be computed with as any tensor in host memory.

    Its file loses its name as soon as it is written, so that it is gone when the tensor is, or the process, however
    that ends.

    Args:
        tensor (torch.Tensor): The values, on any device.
        dtype (torch.dtype): The dtype of the copy.
        folder (Path): A folder on the disk.

    Raises:
        OSError: If there is no such folder, or no space left on its disk.
    """
    values = tensor.detach().to('cpu', dtype).contiguous()
    if not values.numel():
        return values.clone()
    with tempfile.NamedTemporaryFile(dir=folder, prefix='snapshot-') as file:
        # Written, and not only made as long: a write to a mapped file that finds the disk full kills the process.
        file.write(values.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, shared=True, size=values.numel(), dtype=dtype)
    return mapped.view(values.shape)
