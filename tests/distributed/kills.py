# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Runs that are killed in the middle of a checkpoint: how they come to stand still there, and what they leave.

The checkpoint of a tiny model is written in milliseconds, which a kill at a random time hardly ever hits. So a rank can
be told to stand still when a part of some checkpoint is on disk, and waits there for what comes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
from composer import Engine, State, Trainer
from composer.utils import checkpoint, dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from composer_bema import BEMA
from composer_bema.averaging.sharding import FlatShard
from composer_bema.formats.completeness import saved_checkpoints
from tests.distributed.programs import Topology, full_state, make_loader, running
from tests.distributed.ranks import Ranks

__all__ = [
    'LINK',
    'Leftovers',
    'Moment',
    'Stop',
    'contents',
    'count_events',
    'kill',
    'leaves',
    'left_in',
    'plan_kills',
    'train',
    'train_from_yaml',
]

# In the middle of a file; before the first shard, in the middle of one, with all shards but in the middle of the
# metadata, and with whole metadata that has not got its name yet.
PLACES_IN_A_FILE = ('file',)
PLACES_IN_A_FOLDER = ('folder', 'shard', 'metadata', 'rename')
# Between the removal of the link to the latest checkpoint and its return.
LINK = 'link'
# The seconds in which a rank that is left over may fail by itself, before it is killed as a launcher does it.
GRACE = 3.0
# The most seconds between an event and the kill at a random time that waits for it; most events take less.
DELAY = 0.03


class Stop(NamedTuple):
    """Where a rank stands still."""

    place: str
    save: int
    """At which of the checkpoints of this process, from 1."""
    rank: int = 0
    fraction: float = 0.5
    """How much of the file there is by then."""


class Moment(NamedTuple):
    """When a run is killed, and who is."""

    stop: Optional[Stop]
    """Where one rank stands still; if None, the kill comes at a random time."""
    progress: float = 0.0
    """That time, as a fraction of the events until a few checkpoints are saved."""
    delay: float = 0.0
    """The seconds after that event."""
    victim: Optional[int] = None
    """The only rank that is killed; if None, all are at once."""

    @property
    def leaves_a_part(self) -> bool:
        """Whether who writes a checkpoint is killed before its end."""
        return self.stop is not None and self.stop.place != LINK and self.victim in (None, self.stop.rank)

    @property
    def leaves_no_link(self) -> bool:
        """Whether who replaces the link is killed before it is back."""
        return self.stop is not None and self.stop.place == LINK and self.victim in (None, self.stop.rank)


def plan_kills(generator: random.Random, number: int, world_size: int, is_sharded: bool) -> list[Moment]:
    """Draws moments: of six, three are in the middle of a checkpoint, one is without the link, two are at random times.

    Of several ranks one alone is killed in three of six, and in one of these it is not the one that stands still.
    """
    places = PLACES_IN_A_FOLDER if is_sharded else PLACES_IN_A_FILE
    six = [('part', 'all'), ('part', 'it'), ('part', 'other'), (LINK, 'all'), ('time', 'all'), ('time', 'it')]
    moments: list[Moment] = []
    upcoming: list[str] = []
    while len(moments) < number:
        for what, who in generator.sample(six, 6):
            upcoming = upcoming or generator.sample(places, len(places))
            place = upcoming.pop() if what == 'part' else what
            rank = generator.randrange(world_size) if place in ('folder', 'shard', 'time') else 0
            victim = {'all': None, 'it': rank, 'other': (rank + 1) % world_size}[who]
            # The first checkpoint of all has no link to replace.
            save = generator.randint(2 if place == LINK else 1, 3)
            fraction = generator.choice([0.0, generator.random(), generator.random(), 1.0])
            moments.append(
                Moment(
                    None if what == 'time' else Stop(place, save, rank, fraction),
                    generator.random(),
                    generator.uniform(0, DELAY),
                    None if world_size == 1 else victim,
                )
            )
    return moments[:number]


def train(
    topology: Topology, folder: Path, steps: int, stop: Optional[Stop], signals: Path, **kwargs: Any
) -> dict[str, Any]:
    """Trains up to a step, with an update every other step, an evaluation and a checkpoint after each."""
    with (
        stopping(stop, signals),
        running(
            topology,
            algorithms=[functools.partial(BEMA, '2ba')],
            max_duration=f'{steps}ba',
            eval_dataloader=make_loader(),
            eval_interval='1ba',
            eval_subset_num_batches=2,
            run_name='killed',
            save_folder=str(folder),
            save_interval='1ba',
            **kwargs,
        ) as trainer,
    ):
        # The last checkpoint may have been the one of the last step.
        if trainer.state.timestamp.batch < steps:
            trainer.fit()
        return everything(trainer.state)


def train_from_yaml(path: str, overrides: list[str], stop: Optional[Stop], signals: Path) -> None:
    # They take a while to import, and the other runs do not need them.
    from composer_bema.training.config import load_config
    from composer_bema.training.run import train

    with (
        stopping(stop, signals),
        # Either takes longer than the run. The second imports every model of transformers to say so.
        mock.patch('composer.utils.collect_env.get_cpu_model', return_value='CPU'),
        mock.patch('composer.models.huggingface._is_registered_causal_lm', return_value=True),
    ):
        train(load_config(path, overrides))


def everything(state: State) -> dict[str, Any]:
    """The training weights and the optimizer in full, and of the average all that this rank has: buffers, counters."""
    (bema,) = [algorithm for algorithm in state.algorithms if isinstance(algorithm, BEMA)]
    saved = bema.saved_state()
    buffers = {
        name: {n: (t.local if isinstance(t, FlatShard) else t).detach().clone() for n, t in tensors.items()}
        for name, tensors in saved['buffers'].items()
    }
    seen = full_state(state)
    if state.fsdp_enabled and dist.get_global_rank() > 0:
        # The statistics of a BatchNorm are each rank's own under FSDP, and Composer's checkpoints have those of rank 0.
        seen['weights'] = {name: tensor for name, tensor in seen['weights'].items() if '.running_' not in name}
    return {**seen, 'average': {**saved, 'buffers': buffers}}


@contextlib.contextmanager
def stopping(stop: Optional[Stop], signals: Path) -> Iterator[None]:
    """Lets a run note in the folder ``signals`` how far it is, and a rank stand still where it is told to."""
    patch = _Patch(stop if stop is not None and stop.rank == dist.get_global_rank() else None, signals)
    with (
        mock.patch.object(Trainer, 'fit', patch.fit(Trainer.fit)),
        mock.patch.object(Engine, 'run_event', patch.run_event(Engine.run_event)),
        mock.patch.object(checkpoint, '_save_checkpoint', patch.save_checkpoint(checkpoint._save_checkpoint)),
        mock.patch.object(torch, 'save', patch.save(torch.save)),
        mock.patch.object(dcp, 'save', patch.stop_before(dcp.save, 'folder')),
        mock.patch.object(FileSystem, 'create_stream', patch.create_stream(FileSystem.create_stream)),
        mock.patch.object(FileSystem, 'rename', patch.stop_before(FileSystem.rename, 'rename')),
        mock.patch.object(os, 'symlink', patch.stop_before(os.symlink, LINK)),
    ):
        yield


class _Patch:
    """Makes functions that do what they did, and besides note it or stand still."""

    def __init__(self, stop: Optional[Stop], signals: Path) -> None:
        self.stop = stop
        self.signals = signals
        self.saves = 0

    def fit(self, original: Any) -> Any:
        def fit(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if dist.get_global_rank() == 0:
                # Not there without its content.
                (self.signals / 'step').write_text(str(trainer.state.timestamp.batch.value))
                (self.signals / 'step').rename(self.signals / 'begun')
            original(trainer, *args, **kwargs)

        return fit

    def run_event(self, original: Any) -> Any:
        def run_event(*args: Any, **kwargs: Any) -> Any:
            if dist.get_global_rank() == 0:
                with (self.signals / 'events').open('ab') as file:
                    file.write(b'.')
            return original(*args, **kwargs)

        return run_event

    def save_checkpoint(self, original: Any) -> Any:
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            self.saves += 1
            return original(*args, **kwargs)

        return save_checkpoint

    def stop_before(self, original: Any, place: str) -> Any:
        def stop_and_call(*args: Any, **kwargs: Any) -> Any:
            if self._is_at(place):
                self._stand_still()
            return original(*args, **kwargs)

        return stop_and_call

    def save(self, original: Any) -> Any:
        def save(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            # What is sent to other ranks is saved into memory.
            if isinstance(file, io.BufferedWriter) and self._is_at('file'):
                content = io.BytesIO()
                original(obj, content, *args, **kwargs)
                self._write(content.getvalue(), file)
            else:
                original(obj, file, *args, **kwargs)

        return save

    def create_stream(self, original: Any) -> Any:
        @contextlib.contextmanager
        def create_stream(files: FileSystem, path: Path, mode: str) -> Iterator[Any]:
            with original(files, path, mode) as file:
                if mode == 'wb' and self._is_at('metadata' if path.name.startswith('.metadata') else 'shard'):
                    content = _Unclosed()
                    yield content
                    self._write(content.getvalue(), file)
                else:
                    yield file

        return create_stream

    def _is_at(self, place: str) -> bool:
        return self.stop is not None and (self.stop.place, self.stop.save) == (place, self.saves)

    def _stand_still(self) -> None:
        self.stop = None
        (self.signals / 'stands').touch()
        while not (self.signals / 'go').exists():
            time.sleep(0.002)

    def _write(self, content: bytes, file: Any) -> None:
        assert self.stop is not None, 'it is there'
        end = min(int(self.stop.fraction * len(content)), len(content) - 1)
        file.write(content[:end])
        file.flush()
        self._stand_still()
        file.write(content[end:])


class _Unclosed(io.BytesIO):
    """Can be read after it has been closed."""

    def close(self) -> None:
        pass


def count_events(signals: Path) -> int:
    """Returns how many of the Trainer's events there were in a run."""
    events = signals / 'events'
    return events.stat().st_size if events.exists() else 0


def kill(ranks: Ranks, moment: Moment, signals: Path, events: int) -> Optional[list[int | None]]:
    """Kills a run at a moment, and returns the ranks' exit codes; None instead if the run was through before.

    A rank that is not killed goes on and fails for want of the others. If it does not, its exit code is None, and it is
    killed then.

    Args:
        ranks (Ranks): The run.
        moment (Moment): The moment.
        signals (Path): The folder that the run was given.
        events (int): How many of the Trainer's events the ``progress`` is a fraction of.

    Raises:
        AssertionError: If a rank fails before the kill.
    """

    def is_due() -> bool:
        if moment.stop is None:
            return count_events(signals) >= moment.progress * events
        return (signals / 'stands').exists()

    while None in ranks.exit_codes and not any(ranks.exit_codes) and not is_due():
        time.sleep(0.002)
    if moment.stop is None:
        time.sleep(moment.delay)
    if any(ranks.exit_codes):
        # It says what happened.
        ranks.results()
    if None not in ranks.exit_codes:
        return None
    if moment.victim is None:
        return ranks.kill()
    os.kill(ranks.pids[moment.victim], signal.SIGKILL)
    (signals / 'go').touch()
    end = time.monotonic() + GRACE
    while None in ranks.exit_codes and time.monotonic() < end:
        time.sleep(0.01)
    codes = ranks.exit_codes
    ranks.kill()
    return codes


class Leftovers(NamedTuple):
    """What a killed run has left in its folder."""

    whole: Optional[str]
    """The newest checkpoint that can be read."""
    step: int
    """The steps that had been done by then."""
    parts: list[str]
    """Newer ones, which cannot."""
    lacks_link: bool
    """Whether there is a checkpoint, but no link to the latest one."""


def left_in(folder: Path) -> Leftovers:
    """Returns what is in a folder, by trying to read it."""
    parts = []
    for entry in sorted(saved_checkpoints(folder), reverse=True):
        try:
            contents(entry.path)
        # The latter is no Exception.
        except (Exception, dcp.api.CheckpointException):
            parts.append(entry.path.name)
        else:
            return Leftovers(entry.path.name, entry.batch, parts, not os.path.lexists(folder / 'latest-rank0.pt'))
    return Leftovers(None, 0, parts, lacks_link=False)


def contents(path: Path) -> dict[tuple, Any]:
    """Returns all that is in a checkpoint by its path there, as `leaves` does; of a sharded one the bytes of each leaf.

    It reads with torch alone, so that it can tell whether our own reader is right.
    """
    if path.is_file():
        return dict(leaves(torch.load(path, weights_only=False)))
    metadata = dcp.FileSystemReader(path).read_metadata()
    assert metadata.planner_data is not None, 'torch writes it'
    found = {}
    for index, info in metadata.storage_data.items():
        key = metadata.planner_data[index.fqn]
        part = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert len(part) == info.length, f'{info.relative_path} is cut off'
        if not _differs_between_runs(key):
            found[(*key, index.offset)] = part
    return found


def leaves(nest: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """All that is in a nest of containers by its path there, but for the clock on the wall and the names of folders."""
    if _differs_between_runs(path):
        return
    if isinstance(nest, dict):
        for key, value in nest.items():
            yield from leaves(value, (*path, key))
    elif isinstance(nest, (list, tuple)):
        for index, value in enumerate(nest):
            yield from leaves(value, (*path, index))
    else:
        yield path, nest


def _differs_between_runs(path: tuple) -> bool:
    return 'CheckpointSaver' in path or any(str(key).endswith('_wct') for key in path)
