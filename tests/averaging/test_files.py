# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A tensor on disk is one to compute with, and its file is gone from the start."""

import pytest
import torch

from composer_bema.averaging.files import copy_in_file


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize('shape', [(3, 5), (), (0,), (0, 4)])
def test_a_copy_has_the_values_and_no_file(tmp_path, dtype, shape):
    tensor = (10 * torch.randn(shape)).to(dtype)
    copy = copy_in_file(tensor, dtype, tmp_path)
    assert copy.dtype == dtype and copy.shape == tensor.shape and torch.equal(copy, tensor)
    assert not list(tmp_path.iterdir())
    copy.fill_(1)
    assert bool((copy == 1).all())
    assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


def test_a_copy_in_another_dtype_and_layout(tmp_path):
    tensor = torch.randn(4, 6).t()
    copy = copy_in_file(tensor, torch.bfloat16, tmp_path)
    assert torch.equal(copy, tensor.bfloat16()) and copy.is_contiguous()


def test_a_parameter_is_copied_without_its_gradient(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    copy = copy_in_file(parameter, torch.float32, tmp_path)
    assert not copy.requires_grad and torch.equal(copy, parameter.detach())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        copy_in_file(torch.ones(2), torch.float32, tmp_path / 'nowhere')
