# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tensors that are read when they are asked for."""

import pytest
import torch

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
