# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A run that is killed again and again, also in the middle of a checkpoint, ends as if it had not been.

Every kill is a SIGKILL, and every restart goes on from the newest whole checkpoint. There are more of them in
`make test-kills`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import torch

from composer_bema.formats.completeness import INCOMPLETE, newest_complete_checkpoint, saved_checkpoints
from composer_bema.training.outputs import evaluation_curves, read_metrics
from tests.distributed.kills import (
    LINK,
    Leftovers,
    Moment,
    Stop,
    contents,
    count_events,
    kill,
    leaves,
    left_in,
    plan_kills,
    train,
    train_from_yaml,
)
from tests.distributed.programs import TOPOLOGIES
from tests.distributed.ranks import TIMEOUT, Ranks, start_ranks
from tests.training.tiny import tiny_settings, write_yaml

# How often each run is killed, and from where the moments are drawn.
KILLS = int(os.environ.get('KILLS', 6))
SEED = int(os.environ.get('KILLS_SEED', 0))
# A kill at a random time comes in the time of about so many checkpoints.
RANDOM_SAVES = 2

# Starts a run on its ranks: the folder for its checkpoints, its steps, where one stands still, the folder for signals.
Start = Callable[[Path, int, Optional[Stop], Path], Ranks]


class Kill(NamedTuple):
    """A kill and what came of it."""

    moment: Moment
    codes: list[int | None]
    """How the ranks ended; None for one that was still there for want of the others, and was killed then."""
    left: Leftovers


def compare_with_a_killed_run(tmp_path: Path, name: str, world_size: int, is_sharded: bool, start: Start) -> None:
    """Runs to the end, and again with kills; what the ranks return and every checkpoint have to be equal."""
    moments = plan_kills(random.Random(f'{SEED} {name}'), KILLS, world_size, is_sharded)
    # More than the run can do before the last kill.
    steps = 4 + sum(moment.stop.save if moment.stop else 2 * RANDOM_SAVES for moment in moments)
    signals = tmp_path / 'signals'
    signals.mkdir()
    with start(tmp_path / 'whole', steps, None, signals) as ranks:
        expected = ranks.results()
    events = count_events(signals) * RANDOM_SAVES // steps

    print(f'{name}: KILLS={KILLS} KILLS_SEED={SEED}')
    kills, results = kill_again_and_again(
        tmp_path / 'killed', functools.partial(start, tmp_path / 'killed', steps), moments, events
    )
    parts = list((tmp_path / 'killed').glob(f'*{INCOMPLETE}'))
    print(summary(kills, len(parts)))
    # Otherwise it would show nothing.
    assert len(kills) == KILLS
    assert len(parts) >= sum(moment.leaves_a_part for moment in moments) >= 2
    assert any(kill.left.lacks_link for kill in kills)

    for found, result in zip(results, expected, strict=True):
        assert_equal(dict(leaves(found)), dict(leaves(result)))
    saved, others = (sorted(saved_checkpoints(tmp_path / name)) for name in ('killed', 'whole'))
    assert [entry.path.name for entry in saved] == [entry.path.name for entry in others]
    for entry, other in zip(saved, others, strict=True):
        assert_equal(contents(entry.path), contents(other.path))


def kill_again_and_again(
    folder: Path, start: Callable[[Optional[Stop], Path], Ranks], moments: list[Moment], events: int
) -> tuple[list[Kill], list[Any]]:
    """Starts a run, kills it at each of the moments, starts it again, and returns its results when it is through."""
    kills: list[Kill] = []
    left = left_in(folder)
    for n, moment in enumerate([*moments, None]):
        signals = folder.with_name(f'signals-{n}')
        signals.mkdir()
        with start(moment.stop if moment else None, signals) as ranks:
            codes = kill(ranks, moment, signals, events) if moment else None
            results = ranks.results() if codes is None else []
        begun = int((signals / 'begun').read_text()) if (signals / 'begun').exists() else None
        print(f'{n}: from step {begun}, {moment}')
        # It went on from the newest whole checkpoint, and did not start all over.
        assert begun in (left.step, None)
        if moment is None:
            return kills, results
        assert codes is not None, 'it was through before that'
        left = left_in(folder)
        print(f'   {codes}, {left}')
        assert left.parts or not moment.leaves_a_part
        assert left.lacks_link or not moment.leaves_no_link
        kills.append(Kill(moment, codes, left))
    raise AssertionError('the last time it is not killed')


def summary(kills: list[Kill], parts: int) -> str:
    stops = [kill.moment.stop.place if kill.moment.stop else 'random time' for kill in kills]
    alone = [kill for kill in kills if kill.moment.victim is not None]
    return (
        f'{len(kills)} kills ({", ".join(f"{stops.count(place)} {place}" for place in sorted(set(stops)))}), '
        f'{len(alone)} of one rank, after {sum(None not in kill.codes for kill in alone)} of which the other failed; '
        f'{parts} parts of checkpoints, {sum(kill.left.lacks_link for kill in kills)} times no link'
    )


def assert_equal(found: dict[tuple, Any], expected: dict[tuple, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [path for path in expected if not is_same(found[path], expected[path])] == []


def is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, (bytes, str, int, float, type(None))):
        return one == other
    # Tensors, metrics and the state of random numbers: bits, where -0.0 is not 0.0.
    return as_bytes(one) == as_bytes(other)


def as_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize('name', ['single', 'ddp', 'fsdp1', 'fsdp2'])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(name: str, tmp_path: Path) -> None:
    """Weights, averages, counters, the optimizer, and every checkpoint on the way are equal to the last bit."""
    topology = TOPOLOGIES[name]

    def start(folder: Path, steps: int, stop: Optional[Stop], signals: Path) -> Ranks:
        load_path = newest_complete_checkpoint(folder, set_aside=True)
        arguments = (topology, folder, steps, stop, signals)
        return start_ranks(train, topology.world_size, *arguments, load_path=load_path, timeout=TIMEOUT + steps)

    compare_with_a_killed_run(tmp_path, name, topology.world_size, topology.is_sharded, start)


@pytest.mark.parametrize('world_size', [1, 2])
def test_a_killed_run_of_a_yaml_goes_on_by_itself(world_size: int, tmp_path: Path) -> None:
    """With ``autoresume``; its metrics are those of the run that was not killed, too."""
    path = write_yaml(tmp_path, tiny_settings(tmp_path))

    def start(folder: Path, steps: int, stop: Optional[Stop], signals: Path) -> Ranks:
        overrides = [
            'algorithms.bema={update_freq: 2ba}',
            'run_name=killed',
            f'run_folder={folder}-run',
            f'save_folder={folder}',
            'autoresume=true',
            'save_interval=1ba',
            'eval_interval=1ba',
            f'max_duration={steps}ba',
        ]
        return start_ranks(train_from_yaml, world_size, path, overrides, stop, signals, timeout=TIMEOUT + steps)

    compare_with_a_killed_run(tmp_path, f'yaml-{world_size}', world_size, False, start)
    found, expected = (read_metrics(tmp_path / f'{name}-run' / 'metrics.jsonl') for name in ('killed', 'whole'))
    assert evaluation_curves(found) == evaluation_curves(expected)
    losses, others = (
        {record['batch']: record['loss/train/total'] for record in records if 'loss/train/total' in record}
        for records in (found, expected)
    )
    assert losses == others


@pytest.mark.parametrize(
    ('name', 'place', 'whole', 'begins', 'error'),
    [
        ('fsdp2-one-rank', LINK, 3, 0, None),
        ('single', LINK, 3, 0, 'FileExistsError'),
        ('single', 'file', 2, 2, 'FileExistsError'),
    ],
)
def test_composers_own_autoresume_does_not_survive_that(
    name: str, place: str, whole: int, begins: int, error: Optional[str], tmp_path: Path
) -> None:
    """It starts over without the link, of shards without a word, and stops at a file that is a part."""
    moment = Moment(Stop(place, save=3))
    first, second = tmp_path / 'first', tmp_path / 'second'
    first.mkdir()
    second.mkdir()
    run = functools.partial(start_ranks, train, 1, TOPOLOGIES[name], tmp_path / 'killed', 4)
    with run(moment.stop, first) as ranks:
        kill(ranks, moment, first, 0)
    assert left_in(tmp_path / 'killed').step == whole
    fails = pytest.raises(AssertionError, match=error) if error else contextlib.nullcontext()
    with run(None, second, autoresume=True) as ranks, fails:
        ranks.results()
    assert int((second / 'begun').read_text()) == begins
