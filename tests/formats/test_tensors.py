# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tensors that are read when they are asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.digests import digest
from composer_bema.formats.tensors import LazyTensor


def test_nothing_is_read_before_it_is_asked_for():
    reads = []

    def read():
        reads.append(1)
        return torch.arange(6.0)

    lazy = LazyTensor(torch.Size([6]), torch.float32, read)
    changed = lazy.to(torch.bfloat16).reshape(torch.Size([2, 3]))
    assert not reads
    assert (changed.shape, changed.dtype) == ((2, 3), torch.bfloat16)
    assert torch.equal(changed.read(), torch.arange(6.0).bfloat16().view(2, 3))
    assert len(reads) == 1


def test_whole_numbers_keep_their_dtype():
    assert LazyTensor.of(torch.tensor(3)).to(torch.bfloat16).read().dtype == torch.int64


def test_a_digest_that_differs_is_an_error():
    tensor = torch.arange(6.0)
    lazy = LazyTensor.of(tensor)
    assert torch.equal(lazy.checked(digest(tensor), 'damaged').read(), tensor)
    with pytest.raises(ValueError, match='damaged'):
        lazy.checked(digest(tensor) + 1, 'damaged').read()


# Piece by piece


def streamed(tensor):
    """One that can only be read piece by piece."""

    def read():
        raise AssertionError('it is not to be read at once')

    return LazyTensor(tensor.shape, tensor.dtype, read, lambda size, memory: iter(tensor.reshape(-1).split(size)))


@given(shape=st.lists(st.integers(0, 5), max_size=3), size=st.integers(1, 130))
def test_pieces_are_of_one_size_but_for_the_last(shape, size):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    pieces = [piece.clone() for piece in LazyTensor.of(tensor).pieces(size)]
    assert torch.equal(torch.cat(pieces), tensor.reshape(-1))
    assert all(piece.numel() == size for piece in pieces[:-1])
    assert len(pieces) == max(1, -(-tensor.numel() // size))


def test_pieces_are_in_row_major_order_whatever_the_memory():
    tensor = torch.arange(6.0).view(3, 2).t()
    assert torch.cat([piece.clone() for piece in LazyTensor.of(tensor).pieces(4)]).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize('shape', [(), (0,), (0, 3), (5,), (2, 4)])
def test_pieces_of_another_dtype_and_shape(shape):
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    changed = streamed(tensor).to(torch.bfloat16).reshape(torch.Size([tensor.numel(), 1]))
    assert (changed.shape, changed.dtype) == ((tensor.numel(), 1), torch.bfloat16)
    assert torch.equal(torch.cat([piece.clone() for piece in changed.pieces(3)]), tensor.bfloat16().reshape(-1))


@pytest.mark.parametrize('shape', [(), (0,), (5,), (7, 3)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.bool])
def test_a_digest_is_checked_as_the_pieces_pass(shape, dtype):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    for size in (1, 4, 100):
        pieces = streamed(tensor).checked(digest(tensor), 'damaged').pieces(size)
        assert torch.equal(torch.cat(list(pieces)), tensor.reshape(-1))


def test_a_damaged_value_is_noticed_after_the_last_piece():
    tensor = torch.arange(6.0)
    pieces = streamed(tensor).checked(digest(tensor + 1), 'damaged').pieces(4)
    assert [next(pieces).tolist(), next(pieces).tolist()] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match='damaged'):
        next(pieces)


def test_equality_is_of_shape_dtype_and_values():
    tensor = torch.arange(6.0)
    lazy = streamed(tensor)
    assert lazy.equals(streamed(tensor.clone()))
    for other in (tensor.view(2, 3), tensor.int(), tensor + torch.eye(6)[5]):
        assert not lazy.equals(streamed(other))


@pytest.mark.parametrize('shape', [(), (0,), (1,), (2, 3), (3, 70000)])
def test_values_that_are_all_the_same(shape):
    """However many pieces they are read in."""
    tensor = torch.full(shape, 2.0)
    assert streamed(tensor).is_constant()
    if tensor.numel() > 1:
        tensor.view(-1)[-1] = 3
        assert not streamed(tensor).is_constant()
