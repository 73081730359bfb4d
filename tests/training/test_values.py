# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Values of a YAML against the annotations of the arguments that they are for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Optional, Union

import pytest
from composer.core import Time
from torch import Tensor

from composer_bema.training.values import describe, fits

PAIR = tuple[Union[float, Tensor], Union[float, Tensor]]


@pytest.mark.parametrize(
    ('hint', 'good', 'bad'),
    [
        (Any, [1, 'a', None, []], []),
        (bool, [True], ['abc', 1]),
        (int, [1, -1], ['1', 1.5, True, None]),
        (float, [1, 1.5], ['1e', True]),
        (Optional[int], [1, None], ['a']),
        (int | None, [1, None], ['a']),
        (Union[str, Time], ['1ba', '0.1dur'], ['soon', '10', 10, '1.5ba', 'infba']),
        (Union[int, str, Time], ['1ba', 10], ['soon']),
        (Union[str, Callable], ['a'], [3]),
        (Literal['a', 'b'], ['a'], ['c', None]),
        (Sequence[str], [['a'], []], ['a', [1], 3]),
        (list[Union[str, Time]], [['1ba']], [['soon'], '1ba']),
        (PAIR, [[0.9, 0.95]], [[0.9], [0.9, 'a'], 0.9]),
        (Mapping[str, Any], [{}], [3, []]),
    ],
)
def test_fits(hint, good, bad):
    assert all(fits(value, hint) for value in good)
    assert not any(fits(value, hint) for value in bad)


@pytest.mark.parametrize(
    ('hint', 'text'),
    [
        (Optional[int], 'a whole number'),
        (Union[str, Time], "a Composer time such as '100ba'"),
        (Literal['a', 'b'], 'one of a, b'),
        (PAIR, 'a list of 2 items, each a number'),
        (Union[str, Sequence[str]], 'a text or a list of items, each a text'),
        (Optional[Mapping[str, Any]], '`key: value` pairs'),
        (Tensor, ''),
    ],
)
def test_describe(hint, text):
    assert describe(hint) == text
