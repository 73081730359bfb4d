# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The dtype, device and disk that buffers are kept in."""

from pathlib import Path

import pytest
import torch

from composer_bema.averaging import keeping


@pytest.mark.parametrize(
    ('dtype', 'buffer', 'narrow'),
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.bfloat16),
        (torch.complex64, torch.complex64, torch.bfloat16),
        (torch.int64, torch.int64, torch.bfloat16),
    ],
)
def test_averages_are_kept_wide_and_weights_narrow(dtype, buffer, narrow):
    weight = torch.ones(2, dtype=dtype)
    assert keeping.buffer_dtype(weight) == buffer
    assert keeping.narrow_dtype(weight) == narrow
    assert keeping.is_inexact(weight) is (dtype != torch.int64)


@pytest.mark.parametrize('on_disk', [False, True])
def test_what_is_kept_is_a_copy(tmp_path, on_disk):
    weight = torch.tensor([1.5, 2.5], dtype=torch.bfloat16)
    folder = tmp_path / 'made' / 'when needed' if on_disk else None
    copies = [
        keeping.kept_copy(weight, torch.float32, weight, None),
        keeping.kept_snapshot(weight, torch.float32, weight, None, folder),
    ]
    weight.zero_()
    for kept in copies:
        assert kept.dtype == torch.float32
        assert kept.tolist() == [1.5, 2.5]
    assert (tmp_path / 'made').exists() is on_disk


@pytest.mark.parametrize('folder', ['', 5])
def test_a_folder_that_is_none_is_an_error_that_names_it(folder):
    with pytest.raises(TypeError, match=f'snapshot_folder must be None or the path of a folder, but is {folder!r}'):
        keeping.parse_folder(folder)


def test_what_is_not_given_is_none():
    assert keeping.parse_device(None) is None
    assert keeping.parse_folder(None) is None
    assert keeping.parse_folder('~/snapshots') == Path.home() / 'snapshots'
