# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of a step on lists of tensors by torch's `_foreach` functions: few launches, but a pass over memory each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

import torch

from composer_bema.averaging.rules import Difference, Lerp, Row

__all__ = ['apply_rows']

_Tensors = Union[list[torch.Tensor], tuple[torch.Tensor, ...]]


def apply_rows(rows: Sequence[Row], operands: Mapping[str, _Tensors]) -> None:
    """Applies rows in place.

    Args:
        rows (Sequence[Row]): The rows.
        operands (Mapping[str, list[torch.Tensor]]): Tensors of the same shapes in the same order for each operand,
            each operand of one dtype, all on one device. A row takes up to three temporaries of the size of them all.
    """
    for row in rows:
        if isinstance(row, Lerp):
            _lerp(row, operands)
        else:
            _difference(row, operands)


def _lerp(row: Lerp, operands: Mapping[str, _Tensors]) -> None:
    targets, sources = operands[row.target], operands[row.source]
    if row.weight == 1:
        torch._foreach_copy_(targets, sources)
    else:
        torch._foreach_lerp_(targets, _like(targets, sources), row.weight)


def _difference(row: Difference, operands: Mapping[str, _Tensors]) -> None:
    targets = operands[row.target]
    minuends, subtrahends = (_like(targets, operands[name]) for name in (row.minuend, row.subtrahend))
    differences = torch._foreach_sub(minuends, subtrahends)
    if row.base != row.target:
        torch._foreach_copy_(targets, operands[row.base])
    torch._foreach_add_(targets, differences, alpha=row.scale)


def _like(targets: _Tensors, operands: _Tensors) -> _Tensors:
    """Returns ``operands`` in the dtype of the targets."""
    if operands[0].dtype == targets[0].dtype:
        return operands
    converted = [torch.empty_like(target) for target in targets]
    torch._foreach_copy_(converted, operands)
    return converted
