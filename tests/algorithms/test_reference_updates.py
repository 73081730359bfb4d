# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""When a reference becomes the average: in all units, when clocks are set back, and what is refused."""

import warnings
from typing import Any

import pytest

from composer_bema import BEMA
from tests.algorithms.runs import ReferenceModel, follow_with_reference


@pytest.mark.parametrize(
    ('freq', 'after', 'expected'),
    [
        ('7ba', '0ba', [7, 14, 21, 28]),
        ('7ba', '3ba', [3, 10, 17, 24]),
        ('1ep', '0ba', [10, 20, 30]),
        ('1ep', '2ep', [20, 30]),
        ('0.5dur', '0ba', [15, 30]),
        ('20ba', '0.1dur', [3, 23]),
        ('1ep', '13ba', [13, 20, 30]),
    ],
)
def test_updates_by_any_unit(golden, freq: str, after: str, expected: list[int]):
    trajectory = golden('trajectory').arrays
    settings = {'update_freq': '1ba', 'ref_model_update_freq': freq, 'ref_model_update_after': after}
    assert follow_with_reference(ReferenceModel(trajectory), trajectory, '3ep', **settings) == expected


def test_nothing_is_updated_before_the_average_has_been(golden):
    trajectory = golden('trajectory').arrays
    settings = {'update_freq': '10ba', 'update_after': '5ba', 'ref_model_update_freq': '4ba'}
    assert follow_with_reference(ReferenceModel(trajectory), trajectory, '3ep', **settings) == [16, 20, 24, 28]


def test_clocks_that_are_set_back_are_counted_from_there(golden):
    trajectory = golden('trajectory').arrays
    settings = {'update_freq': '1ba', 'ref_model_update_freq': '4ba'}
    steps = follow_with_reference(ReferenceModel(trajectory), trajectory, '1ep', fits=2, **settings)
    assert steps == [4, 8, 4, 8]


def test_a_reference_that_will_not_follow_is_warned_of(golden):
    trajectory = golden('trajectory').arrays
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert not follow_with_reference(ReferenceModel(trajectory), trajectory, '1ep', update_freq='1ba')
    assert [w for w in caught if 'first update is due after 400 steps, but the run ends after 10' in str(w.message)]


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'ref_model_update_freq': '0ba'}, ValueError, 'ref_model_update_freq'),
        ({'ref_model_update_freq': 400}, TypeError, 'ref_model_update_freq'),
        ({'ref_model_update_after': '-1ba'}, ValueError, 'ref_model_update_after'),
    ],
)
def test_times_that_are_none_are_refused(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        BEMA(update_ref_model=True, **settings)


def test_settings_say_whether_a_reference_follows():
    assert 'ref_model' not in repr(BEMA())
    assert "ref_model_update_freq='3ba'" in repr(BEMA(update_ref_model=True, ref_model_update_freq='3ba'))
