# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tensors of a checkpoint that are read when they are asked for, so that one at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from composer_bema.averaging.digests import digest

__all__ = ['LazyTensor']


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by its shape and dtype, and read by calling ``read``."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """Returns one that needs no reading."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """Returns it in another dtype; what is no floating-point number stays as it is."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))

    def reshape(self, shape: torch.Size) -> LazyTensor:
        """Returns it in another shape of as many elements."""
        return self if shape == self.shape else LazyTensor(shape, self.dtype, lambda: self.read().reshape(shape))

    def checked(self, expected: int, complaint: str) -> LazyTensor:
        """Returns it with a check of its digest: reading other values raises a ``ValueError`` of ``complaint``."""

        def read() -> torch.Tensor:
            tensor = self.read()
            if digest(tensor) != expected:
                raise ValueError(complaint)
            return tensor

        return LazyTensor(self.shape, self.dtype, read)
