# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Composer's time strings as an average uses them: read, checked against a run, and compared with its clocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Optional, Union

from composer import State, Time, Timestamp, TimeUnit

__all__ = [
    'check_unit',
    'clocks',
    'count_in',
    'has_reached',
    'in_half_lives',
    'intervals_since',
    'parse_time',
    'parse_update_freq',
    'steps_of_run',
    'steps_to_first_update',
    'times_since',
]

_FORM = "a Composer time string such as '400ba', '1ep', '0.1dur' or '1000000tok'"
_CLOCKS = (TimeUnit.ITERATION, TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN)


def parse_time(name: str, value: Any, *, positive: bool) -> Time:
    """Reads a setting given as a time string or a :class:`.Time`.

    Raises:
        TypeError: If it is neither.
        ValueError: If it does not parse, is negative, is zero where ``positive`` is asked, exceeds the run, or counts
            seconds.
    """
    if not isinstance(value, (str, Time)):
        raise TypeError(f'{name} must be {_FORM}, but is {value!r}.')
    try:
        time = Time.from_input(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f'{name} must be {_FORM}, but is {value!r}.') from error
    if time.unit == TimeUnit.SECOND and isinstance(value, str) and not any(map(str.isalpha, value)):
        # Composer reads a time of day in what has no unit.
        raise ValueError(f'{name} must be {_FORM}, but is {value!r}, which has no unit.')
    if time.unit == TimeUnit.SECOND:
        raise ValueError(f'{name}={value!r} counts wall-clock time, which no two runs share; count steps or tokens.')
    if not (math.isfinite(time.value) and (time.value > 0 if positive else time.value >= 0)):
        raise ValueError(f'{name} must be {"positive" if positive else "at least 0"}, but is {value!r}.')
    if time.unit == TimeUnit.DURATION and time.value > 1:
        raise ValueError(f"{name} must be at most '1dur', the whole run, but is {value!r}.")
    return time


def parse_update_freq(
    update_freq: Optional[Union[str, Time]], update_interval: Optional[Union[str, Time]], default: Union[str, Time]
) -> Time:
    """Reads phi, which has two names.

    Raises:
        TypeError: If it is no time string.
        ValueError: If it is given twice, or is not positive.
    """
    if update_freq is not None and update_interval is not None:
        raise ValueError('update_freq and update_interval are two names of one setting: give one of them.')
    given = next((time for time in (update_freq, update_interval) if time is not None), default)
    return parse_time('update_freq', given, positive=True)


def count_in(name: str, time: Time, divisor_name: str, divisor: Time) -> int:
    """Returns how many times a setting holds another one, both of one unit.

    Raises:
        ValueError: If their units differ, or it is no multiple.
    """
    given = f"{name}='{time.to_timestring()}'", f"{divisor_name}='{divisor.to_timestring()}'"
    if time.unit != divisor.unit:
        raise ValueError(f'{given[0]} and {given[1]} must count the same unit.')
    # As decimals, for in binary 0.3 is no multiple of 0.1.
    count = Fraction(str(time.value)) / Fraction(str(divisor.value))
    if count.denominator != 1:
        raise ValueError(f'{given[0]} must be a multiple of {given[1]}.')
    return int(count)


def in_half_lives(half_life: object) -> Optional[float]:
    """Returns the half-life of a rule whose elapsed time is counted in half-lives, if there is one."""
    return None if half_life is None else 1.0


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


def clocks(timestamp: Timestamp) -> dict[str, int]:
    """Returns a moment of a run as plain numbers: the count of every unit, by its abbreviation."""
    return {unit.value: timestamp.get(unit).value for unit in _CLOCKS}


def has_reached(time: Time, state: State) -> bool:
    """Returns whether a run has come to a point in time."""
    unit, length = _counted(time, state)
    return state.timestamp.get(unit).value >= length


def intervals_since(start: Mapping[str, int], interval: Time, timestamp: Timestamp, state: State) -> int:
    """Returns the whole intervals from ``start`` to ``timestamp``; those in epochs pass at the ends of epochs."""
    unit, length = _counted(interval, state)
    return math.floor((timestamp.get(unit).value - start[unit.value]) / length)


def intervals_passed(start: Mapping[str, int], interval: Time, state: State) -> int:
    """Returns how many multiples of ``interval`` since ``start`` this event is the first one after."""
    assert state.previous_timestamp is not None, 'the trainer sets it with the first step'
    before, now = (
        intervals_since(start, interval, timestamp, state) for timestamp in (state.previous_timestamp, state.timestamp)
    )
    return now - before


def times_since(start: Mapping[str, int], time: Time, state: State) -> float:
    """Returns how many times ``time`` has passed since ``start``, with the fraction; epochs are counted in steps."""
    unit, length = _counted(time, state, epochs_in_steps=True)
    return float((state.timestamp.get(unit).value - start[unit.value]) / length)


def steps_to_first_update(update_after: Time, update_freq: Time, state: State) -> Optional[float]:
    """Returns the optimizer steps at the first update of a run, or None where it cannot be told beforehand."""
    (start_unit, start), (unit, interval) = (
        _counted(time, state, epochs_in_steps=True) for time in (update_after, update_freq)
    )
    if start_unit != TimeUnit.BATCH or unit != TimeUnit.BATCH:
        return None
    start = max(start, state.timestamp.batch.value)
    if update_freq.unit == TimeUnit.EPOCH:
        assert state.dataloader_len is not None, 'or its unit were not steps'
        start -= start % state.dataloader_len.value
    return float(start + interval)


def steps_of_run(state: State) -> Optional[float]:
    """Returns the optimizer steps of a whole run, or None where they cannot be told beforehand."""
    unit, length = _counted(Time(1.0, TimeUnit.DURATION), state)
    return float(length) if unit == TimeUnit.BATCH else None


def _counted(time: Time, state: State, epochs_in_steps: bool = False) -> tuple[TimeUnit, Fraction]:
    """Returns the unit that a time is counted in, and its length there, exactly: 0.3 of ten is over at three.

    A fraction of the run is counted in the unit of its duration, and of epochs in steps, where their number is known.
    """
    if time.unit == TimeUnit.DURATION:
        assert state.max_duration is not None, 'the trainer sets it before the first event of fit'
        unit, whole = _counted(state.max_duration, state, epochs_in_steps=True)
        return unit, Fraction(str(time.value)) * whole
    if time.unit == TimeUnit.EPOCH and epochs_in_steps and state.dataloader_len is not None:
        return TimeUnit.BATCH, Fraction(time.value * state.dataloader_len.value)
    return time.unit, Fraction(time.value)
