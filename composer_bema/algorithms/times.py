# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Composer's time strings as an average uses them: read, checked against a run, and turned into a count."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Optional

from composer import State, Time, Timestamp, TimeUnit

__all__ = [
    'check_unit',
    'counted_unit',
    'elapsed',
    'in_batches',
    'intervals_since',
    'is_reached',
    'parse_time',
    'position',
]

_FORM = "a Composer time string such as '400ba', '1ep', '0.1dur' or '1000000tok'"


def parse_time(name: str, value: Any, *, positive: bool) -> Time:
    """Reads a setting given as a time string or a :class:`.Time`.

    Raises:
        TypeError: If it is neither.
        ValueError: If it does not parse, is negative, is zero where ``positive`` is asked, or counts seconds.
    """
    if not isinstance(value, (str, Time)):
        raise TypeError(f'{name} must be {_FORM}, but is {value!r}.')
    try:
        time = Time.from_input(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f'{name} must be {_FORM}, but is {value!r}.') from error
    if time.unit == TimeUnit.SECOND:
        raise ValueError(f'{name}={value!r} counts wall-clock time, which no two runs share; count steps or tokens.')
    if not (math.isfinite(time.value) and (time.value > 0 if positive else time.value >= 0)):
        raise ValueError(f'{name} must be {"positive" if positive else "at least 0"}, but is {value!r}.')
    return time


def check_unit(name: str, time: Time, state: State) -> None:
    """Checks that the run counts the unit of a setting.

    Raises:
        ValueError: If it does not, so that the moment would never come. Tokens can be told from the first step on.
    """
    if time.unit == TimeUnit.ITERATION and state._iteration_length is None:
        raise ValueError(f"{name}='{time.to_timestring()}' counts iterations, but this run has none.")
    if time.unit == TimeUnit.TOKEN and state.timestamp.batch > 0 and state.timestamp.token == 0:
        raise ValueError(
            f"{name}='{time.to_timestring()}' counts tokens, but the data of this run counts none: give the "
            'dataloader a DataSpec with get_num_tokens_in_batch, or use another unit.',
        )


def is_reached(time: Time, state: State) -> bool:
    """Returns whether the run has reached a point in time."""
    return position(time, state.timestamp, state) >= _length(time, state)


def position(time: Time, timestamp: Timestamp, state: State) -> int:
    """Returns how far ``timestamp`` is, in the unit that ``time`` is counted in."""
    return timestamp.get(counted_unit(time, state)).value


def intervals_since(origin: float, interval: Time, timestamp: Timestamp, state: State) -> int:
    """Returns how many whole intervals have passed at ``timestamp`` since the count stood at ``origin``."""
    return math.floor((position(interval, timestamp, state) - origin) / _length(interval, state))


def elapsed(unit: TimeUnit, state: State) -> float:
    """Returns the time since the start of the run in ``unit``, epochs with the fraction that is done."""
    if unit == TimeUnit.DURATION:
        assert state.max_duration is not None, 'the trainer sets it before the first event of fit'
        return elapsed(state.max_duration.unit, state) / state.max_duration.value
    if unit != TimeUnit.EPOCH:
        return float(state.timestamp.get(unit).value)
    batches = state.timestamp.batch_in_epoch.value
    return state.timestamp.epoch.value + (batches / state.dataloader_len.value if state.dataloader_len else 0.0)


def in_batches(time: Optional[Time], state: State) -> Optional[float]:
    """Returns a time in optimizer steps, or None where the run does not tell."""
    if time is None:
        return None
    if time.unit == TimeUnit.DURATION:
        whole = in_batches(state.max_duration, state)
        return None if whole is None else time.value * whole
    if time.unit == TimeUnit.EPOCH:
        return None if state.dataloader_len is None else time.value * state.dataloader_len.value
    return time.value if time.unit == TimeUnit.BATCH else None


def counted_unit(time: Time, state: State) -> TimeUnit:
    """Returns the unit that a time is counted in; a fraction of the run counts in that of its duration."""
    if time.unit != TimeUnit.DURATION:
        return time.unit
    assert state.max_duration is not None, 'the trainer sets it before the first event of fit'
    in_epochs = state.max_duration.unit == TimeUnit.EPOCH
    return TimeUnit.BATCH if in_epochs and state.dataloader_len is not None else state.max_duration.unit


def _length(time: Time, state: State) -> Fraction:
    """Returns the length of a time in its counted unit, exactly: three tenths of ten have to be reached at 3."""
    if time.unit != TimeUnit.DURATION:
        return Fraction(time.value)
    assert state.max_duration is not None, 'the trainer sets it before the first event of fit'
    whole = state.max_duration.value
    if counted_unit(time, state) != state.max_duration.unit:
        assert state.dataloader_len is not None, 'the counted unit says so'
        whole *= state.dataloader_len.value
    return Fraction(str(time.value)) * whole
