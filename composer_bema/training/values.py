# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Whether a value from a YAML fits the annotation of the argument that it is for, and how to say what would."""

import collections.abc
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from composer.core import Time

__all__ = ['argument_types', 'describe', 'fits']

SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping)
SCALARS = {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    str: 'a text',
    Time: "a Composer time such as '100ba'",
}


def argument_types(builder: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a builder's arguments; none where they name what is not installed here."""
    try:
        return get_type_hints(builder.__init__ if isinstance(builder, type) else builder)
    except (NameError, TypeError):
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, made of YAML's scalars, lists and mappings, is what the annotation ``hint`` asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        # A text for `str | Time` is a time.
        is_time = Time in arguments and isinstance(value, str)
        return _is_time(value) if is_time else any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if (origin or hint) in MAPPINGS:
        return isinstance(value, Mapping)
    if (origin or hint) in SEQUENCES:
        return isinstance(value, list) and _items_fit(value, origin, arguments)
    if hint is Time:
        return _is_time(value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def describe(hint: Any) -> str:
    """What ``hint`` asks for, in the words of a YAML; an argument that nothing in a YAML can be is passed over."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        hints = [argument for argument in arguments if argument is not str or Time not in arguments]
        return ' or '.join(_distinct(describe(argument) for argument in hints))
    if origin is Literal:
        return f'one of {", ".join(map(str, arguments))}'
    if (origin or hint) in MAPPINGS:
        return '`key: value` pairs'
    if (origin or hint) in SEQUENCES:
        # Of the items it is enough to name the first one's type: those of a tuple are alike wherever a YAML has one.
        count = f'{len(arguments)} items' if origin is tuple and Ellipsis not in arguments else 'items'
        return f'a list of {count}, each {describe(arguments[0])}' if arguments else 'a list'
    return SCALARS.get(hint, '')


def _items_fit(values: list[Any], origin: Any, arguments: tuple[Any, ...]) -> bool:
    if not arguments:
        return True
    if origin is tuple and Ellipsis not in arguments:
        return len(values) == len(arguments) and all(map(fits, values, arguments))
    return all(fits(value, arguments[0]) for value in values)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(Time.from_timestring(value).unit)
    except (ValueError, TypeError, OverflowError):
        return False


def _distinct(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]
