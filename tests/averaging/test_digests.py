# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The digest of a whole is the sum of its parts', however it is cut, and no flipped bit leaves it as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.digests import _BLOCK, add_digests, digest, digests_of

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
# More than a block of words in every dtype, and no whole number of words.
VALUES = torch.randn(8 * _BLOCK + 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('dtype', DTYPES)
@given(cuts=st.lists(st.integers(0, len(VALUES)), max_size=4))
def test_the_digests_of_parts_add_up(dtype, cuts):
    values = VALUES.to(dtype)
    ends = [0, *sorted(cuts), len(values)]
    parts = [digest(values[a:b], a) for a, b in zip(ends, ends[1:], strict=False)]
    copies = [digest(values[a:b].clone(), a) for a, b in zip(ends, ends[1:], strict=False)]
    assert add_digests(*parts) == add_digests(*copies) == digest(values)


@pytest.mark.parametrize('dtype', DTYPES)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_the_digest(dtype, place, bit):
    values = VALUES[:1001].to(dtype)
    damaged = values.clone()
    memory = damaged.view(torch.uint8)
    memory[int(place * len(memory))] ^= 1 << bit
    assert digest(damaged) != digest(values)


def test_bits_count_and_places_count():
    """A negative zero is another zero, and the same values in another order are other values."""
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    nan = torch.tensor([float('nan')])
    assert digest(nan) == digest(nan.clone())


def test_layout_does_not_count():
    values = torch.randn(5, 7)
    assert digest(values.t().contiguous().t()) == digest(values) == digest(values.reshape(-1))
    assert digest(torch.tensor(3.0)) == digest(torch.tensor([3.0]))


def test_nothing_has_the_digest_zero():
    assert digest(torch.empty(0)) == 0


def test_digests_go_by_group_and_name():
    tensors = {'ema': {'w': torch.ones(3)}, 'latest': {'n': torch.tensor(4)}}
    assert digests_of(tensors) == {'ema': {'w': digest(torch.ones(3))}, 'latest': {'n': digest(torch.tensor(4))}}
