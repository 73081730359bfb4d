# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is left of a learning rate during a decay: by hand, and what all shapes share."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.averaging.decay_shapes import LearningRateDecay, decay_factor
from composer_bema.averaging.windows import DecayShape

SHAPES = get_args(LearningRateDecay)


@pytest.mark.parametrize(
    ('decay', 'quarter', 'half'),
    [
        ('linear', 0.75, 0.5),
        ('1-sqrt', 0.5, 1 - math.sqrt(0.5)),
        ('cosine', (2 + math.sqrt(2)) / 4, 0.5),
        ('square', 0.9375, 0.75),
        # As far above 1 - u as the cosine is below it, and the other way round.
        ('mirror-cosine', 1.5 - (2 + math.sqrt(2)) / 4, 0.5),
    ],
)
def test_shapes_by_hand(decay, quarter, half):
    for u, left in ((0, 1), (0.25, quarter), (0.5, half), (1, 0)):
        assert decay_factor(decay, u) == pytest.approx(left, rel=0, abs=1e-15)
        # From 1 to 0.2 there are four fifths of the way.
        assert decay_factor(decay, u, 0.2) == pytest.approx(0.2 + 0.8 * left, rel=0, abs=1e-15)


@pytest.mark.parametrize(('u', 'left'), [(0, 1), (0.25, 0.5), (0.5, 0.25), (0.75, 0.125), (1, 0.0625)])
def test_the_exponential_decay_by_hand(u, left):
    assert decay_factor('exponential', u, 0.0625) == left


def test_the_exponential_decay_to_nothing_is_over_at_once():
    assert [decay_factor('exponential', u, 0.0) for u in (0, 0.01, 1)] == [1, 0, 0]


@given(
    decay=st.sampled_from(SHAPES),
    final=st.floats(0, 1),
    parts=st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
)
def test_a_decay_begins_at_1_ends_at_its_final_factor_and_never_rises(decay, final, parts):
    earlier, later = (decay_factor(decay, u, final) for u in parts)
    assert decay_factor(decay, 0, final) == 1
    assert decay_factor(decay, 1, final) == final
    assert 1 >= earlier >= later - 1e-15
    assert later >= final - 1e-15


def test_merges_stand_for_decays_that_a_schedule_can_have():
    assert set(get_args(DecayShape)) < set(SHAPES)
