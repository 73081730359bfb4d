# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Unpickling that executes nothing: plain values come back, objects become inert, and damage is told in a sentence."""

import collections
import datetime
import fractions
import io
from unittest import mock

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from composer_bema.formats.unpickling import Inert, archive_problem, load_archive


@pytest.fixture(params=['file', 'bytes'])
def save(request, tmp_path):
    def save(content):
        if request.param == 'file':
            torch.save(content, tmp_path / 'x.pt')
            return tmp_path / 'x.pt'
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    return save


def test_tensors_and_plain_values_come_back(save):
    content = {
        'tensors': [torch.arange(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor(2.0)],
        'values': (1, 2.5, 'text', b'bytes', None, True, {1, 2}, 2**70, -1),
        'ordered': collections.OrderedDict(a=1),
    }
    loaded = load_archive(save(content))
    assert (loaded['values'], loaded['ordered']) == (content['values'], content['ordered'])
    assert all(torch.equal(*pair) for pair in zip(loaded['tensors'], content['tensors'], strict=True))


class Own:
    def __init__(self):
        self.attribute = [1]


@pytest.mark.parametrize(
    'value',
    [
        np.arange(3),
        np.float64(2),
        np.random.RandomState(0).get_state(),
        TorchVersion('2.7.0'),
        datetime.timezone.utc,
        collections.defaultdict(list, a=[1]),
        Own(),
        Own,
        len,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_else_there_is_becomes_inert(save, value):
    before = set(torch.serialization.get_safe_globals())
    loaded = load_archive(save({'before': 1, 'value': value, 'after': torch.ones(2)}))
    assert (loaded['before'], loaded['after'].tolist()) == (1, [1.0, 1.0])
    values = loaded['value'] if isinstance(loaded['value'], tuple) else (loaded['value'],)
    assert any(isinstance(value, Inert) or value is Inert for value in values)
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_time_that_a_run_has_taken_is_read(save):
    assert load_archive(save({'wct': datetime.timedelta(seconds=3)})) == {'wct': datetime.timedelta(seconds=3)}


def test_a_file_is_mapped_and_not_read(tmp_path):
    torch.save({'x': torch.full([1000], 3.0)}, tmp_path / 'x.pt')
    loaded = load_archive(tmp_path / 'x.pt')
    with (tmp_path / 'x.pt').open('r+b') as file:
        file.seek(file.read().index(torch.full([1000], 3.0).numpy().tobytes()))
        file.write(torch.ones(1000).numpy().tobytes())
    assert loaded['x'].sum() == 1000


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'x': torch.ones(3)}, tmp_path / 'x.pt')
    finally:
        torch.serialization.set_crc32_options(True)
    assert archive_problem(tmp_path / 'x.pt') == ''
    assert load_archive(tmp_path / 'x.pt')['x'].sum() == 3


@pytest.mark.parametrize(
    ('content', 'message'), [(b'', 'its end is missing'), (b'PK\x05\x06' + bytes(18), 'its directory does not fit')]
)
def test_what_is_no_such_file(tmp_path, content, message):
    for source in (content, tmp_path / 'x.pt'):
        (tmp_path / 'x.pt').write_bytes(content)
        assert archive_problem(source).startswith(message)
        with pytest.raises(ValueError, match=message):
            load_archive(source)


def test_tensors_of_a_gpu_are_read_where_there_is_none(save):
    with mock.patch('torch.serialization.location_tag', return_value='cuda:0'):
        source = save({'x': torch.ones(3)})
    assert load_archive(source)['x'].device.type == 'cpu'


def test_times_stay_times_beside_what_is_unknown(save):
    """Which of two classes for one name torch takes may differ from one call to the next."""
    source = save([datetime.timedelta(seconds=3), fractions.Fraction(1, 3)])
    for _ in range(20):
        time, unknown = load_archive(source)
        assert time == datetime.timedelta(seconds=3)
        assert type(unknown) is Inert
