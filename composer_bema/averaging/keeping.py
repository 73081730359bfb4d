# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How the buffers of an average are kept: on which device or disk, and in which dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

import torch

from composer_bema.averaging.files import copy_in_file

__all__ = [
    'buffer_dtype',
    'is_inexact',
    'kept_copy',
    'kept_snapshot',
    'narrow_dtype',
    'parse_device',
    'parse_folder',
    'why_not_kept',
]

_AVERAGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def parse_device(device: Optional[Union[torch.device, str]]) -> Optional[torch.device]:
    """Returns a device by its name or itself.

    Raises:
        ValueError: If it is none.
    """
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be None or the name of a device such as 'cpu', but is {device!r}.") from error


def parse_folder(folder: Optional[Union[Path, str]]) -> Optional[Path]:
    """Returns the path of a folder for snapshots.

    Raises:
        TypeError: If it is none.
    """
    if folder is None:
        return None
    if not (isinstance(folder, (Path, str)) and str(folder)):
        raise TypeError(f'snapshot_folder must be None or the path of a folder, but is {folder!r}.')
    return Path(folder).expanduser()


def kept_copy(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    live: torch.Tensor,
    device: Optional[torch.device],
) -> torch.Tensor:
    """Returns a copy where the buffers of ``live`` are kept; host memory is pinned for an accelerator's weights."""
    # In inference mode it could be written to in no other.
    with torch.inference_mode(False):
        copy = tensor.to(device=live.device if device is None else device, dtype=dtype, copy=True)
        return copy.pin_memory() if copy.device.type == 'cpu' and live.device.type == 'cuda' else copy


def kept_snapshot(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    live: torch.Tensor,
    device: Optional[torch.device],
    folder: Optional[Path],
) -> torch.Tensor:
    """Returns a copy where the snapshots of ``live`` are kept; not pinned, for there may be many."""
    with torch.inference_mode(False):
        if folder is None:
            return tensor.to(device=live.device if device is None else device, dtype=dtype, copy=True)
        folder.mkdir(parents=True, exist_ok=True)
        return copy_in_file(tensor, dtype, folder)


def why_not_kept(tensor: torch.Tensor, is_averaged: bool) -> Optional[str]:
    """Returns why a tensor cannot be averaged, or copied at updates and exchanged at swaps; None if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f'is {"quantized" if tensor.is_quantized else f"of the layout {tensor.layout}"}'
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return 'is expanded, so that elements of it share memory'
    return f'is {tensor.dtype}' if is_averaged and tensor.dtype not in _AVERAGED else None


def is_inexact(tensor: torch.Tensor) -> bool:
    """Returns whether values can be averaged."""
    return tensor.is_floating_point() or tensor.is_complex()


def buffer_dtype(tensor: torch.Tensor) -> torch.dtype:
    """An average kept in 16 bits loses small updates; fp64 weights keep their precision."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.dtype in _AVERAGED else tensor.dtype


def narrow_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of at most 16 bits that may hold the values exactly, for a buffer that no update writes to."""
    return tensor.dtype if tensor.element_size() <= 2 else torch.bfloat16
