# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A cooldown branch: a run at a constant learning rate goes on from a checkpoint, with a decay to the end, elsewhere.

One long run thus stands for runs of many lengths, each of which would need a schedule of its own (arXiv 2405.18392).
"""

import json
import logging
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from composer.core import Time, TimeUnit
from composer.utils import format_name_with_dist
from composer.utils.file_helpers import is_uri

from composer_bema.formats.completeness import saved_checkpoints, why_incomplete
from composer_bema.formats.composer import Checkpoint, open_checkpoint
from composer_bema.training.config import ConfigError, TrainConfig, load_config
from composer_bema.training.outputs import CONFIG_FILE, WHERE, in_folder, is_below, run_folder_of

__all__ = ['cooldown_config']

log = logging.getLogger(__name__)

# The clocks by which a duration can be counted, by their names in a checkpoint. Epochs are counted in steps.
_CLOCKS = {TimeUnit.BATCH: 'batch', TimeUnit.SAMPLE: 'sample', TimeUnit.TOKEN: 'token', TimeUnit.EPOCH: 'batch'}
# What callbacks and loggers call the place where they write.
_PLACES = ('save_folder', 'folder', 'filename', 'log_dir')


class Branch(NamedTuple):
    """Where a cooldown starts, from when to when it goes, and how."""

    checkpoint: Path
    start: Time
    end: Time
    decay: str

    @property
    def suffix(self) -> str:
        """What tells the branch from its run, and from other branches."""
        return f'-cooldown-{self.start}-{self.end}-{self.decay}'

    @property
    def scheduler(self) -> dict[str, Any]:
        length = str(self.end - self.start)
        return {'name': 'warmup_stable_decay', 't_decay': length, 't_max': str(self.end), 'decay': self.decay}


def cooldown_config(
    target: str | Path, fraction: float, decay: str, overrides: Sequence[str] = (), *, at: int | None = None
) -> TrainConfig:
    """The settings of a branch that ends with a cooldown: its run's, but for the schedule, the length and the folders.

    Args:
        target: A run's folder, of which that checkpoint is taken whose branch ends with the run, or last before it; or
            one checkpoint below its run's folder.
        fraction: The part of the branch, counted from the run's first step, that the cooldown takes; in (0, 1).
        decay: Its shape, see :class:`.WarmupStableDecayScheduler`.
        overrides: ``key.path=value`` pairs, which win over everything.
        at: The step of the checkpoint to take from a run's folder instead.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ConfigError: The schedule was not at its full rate at the checkpoint, or the branch would write where its run
            has written, or go on with another branch.
        ValueError: The checkpoint is damaged.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f'fraction must lie between 0 and 1, the whole branch, but is {fraction}.')
    folder, checkpoint = _found(Path(target))
    # The run may have been moved since it was trained.
    config = in_folder(load_config(folder / CONFIG_FILE), folder)
    unit = _unit(config)
    part = Fraction(str(fraction))
    if checkpoint is None:
        checkpoint = _checkpoint_of_run(config, unit, part) if at is None else _checkpoint_of_step(config, at)
    elif at is not None:
        raise ConfigError(f"'{target}' is one checkpoint, which leaves no choice of step {at}: name its run's folder.")
    branch = _branch(checkpoint, unit, part, decay)
    moved = in_folder(config, folder.with_name(folder.name + branch.suffix))
    changes = {
        'run_name': f'{config.run_name}{branch.suffix}',
        **{key: getattr(moved, key) for key in WHERE},
        'max_duration': str(branch.end),
        'scheduler': branch.scheduler,
        'load_path': str(branch.checkpoint),
        'load_weights_only': False,
    }
    given = [f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in changes.items() if value is not None]
    branched = load_config(folder / CONFIG_FILE, [*given, *overrides])
    _check_run_is_left_alone(config, branched)
    _check_branch_is_the_same(branched)
    log.info(
        "From '%s' the learning rate decays until %s; the branch is kept in '%s'.",
        branch.checkpoint,
        branch.end,
        branched.run_folder,
    )
    return branched


def _found(target: Path) -> tuple[Path, Path | None]:
    """The folder of a run, and the checkpoint if the target is one."""
    if not target.exists():
        raise FileNotFoundError(f"No such run or checkpoint: '{target}'.")
    if (target / CONFIG_FILE).is_file():
        # A folder beside it takes its name.
        return (target if target.name not in ('', '..') else Path(os.path.abspath(target))), None
    folder = run_folder_of(target)
    if folder is None:
        raise ConfigError(
            f"'{target}' is no folder of a run and lies in none: there is no {CONFIG_FILE}. Train a YAML of its "
            'settings with load_path and scheduler: {name: warmup_stable_decay, ...}.',
        )
    # A link to the latest checkpoint would soon lead elsewhere.
    return folder, target.resolve() if target.is_symlink() else target


def _unit(config: TrainConfig) -> TimeUnit:
    duration = Time.from_input(config.max_duration, 'ep')
    if duration.unit not in _CLOCKS:
        raise ConfigError(
            f"The run's max_duration is '{duration}', and a branch needs steps, samples, tokens or epochs."
        )
    return TimeUnit.BATCH if duration.unit == TimeUnit.EPOCH else duration.unit


def _branch(path: Path, unit: TimeUnit, fraction: Fraction, decay: str) -> Branch:
    checkpoint = open_checkpoint(path)
    start = _position(checkpoint, unit)
    _check_rate(checkpoint)
    end = round(start / (1 - fraction))
    if end <= start:
        raise ConfigError(
            f"A cooldown over {float(fraction)} of a branch from '{path}' has no step: give a larger fraction."
        )
    return Branch(path, Time(start, unit), Time(end, unit), decay)


def _checkpoints(config: TrainConfig) -> dict[int, Path]:
    """The whole checkpoints of a run by their steps."""
    if config.save_folder is None or is_uri(config.save_folder):
        raise ConfigError(
            f"The run in '{config.run_folder}' had save_folder={config.save_folder or 'null'}, and has left no "
            'checkpoint on this machine: name one.'
        )
    folder = Path(format_name_with_dist(config.save_folder, str(config.run_name)))
    whole = {s.batch: s.path for s in sorted(saved_checkpoints(folder)) if not why_incomplete(s.path)}
    if not whole:
        raise ConfigError(f"The run in '{config.run_folder}' has left no checkpoint in '{folder}': name one.")
    return whole


def _checkpoint_of_step(config: TrainConfig, step: int) -> Path:
    checkpoints = _checkpoints(config)
    if step not in checkpoints:
        nearest = min(checkpoints, key=lambda other: abs(other - step))
        raise ConfigError(
            f"There is no checkpoint of step {step} of the run in '{config.run_folder}'; the nearest is of {nearest}."
        )
    return checkpoints[step]


def _checkpoint_of_run(config: TrainConfig, unit: TimeUnit, fraction: Fraction) -> Path:
    """The last checkpoint of a run from which a cooldown ends before the run did."""
    positions = {path: _position(open_checkpoint(path), unit) for path in _checkpoints(config).values()}
    start = (1 - fraction) * max(positions.values())
    early = [path for path, position in positions.items() if 0 < position <= start]
    if not early:
        raise ConfigError(
            f"A cooldown over {float(fraction)} of the run in '{config.run_folder}' starts at {float(start):g}"
            f'{unit.value}, before its first checkpoint, of {min(positions.values())}{unit.value}: name one for a '
            'longer branch.',
        )
    return early[-1]


def _position(checkpoint: Checkpoint, unit: TimeUnit) -> int:
    timestamp = (checkpoint.timestamp or {}).get('Timestamp')
    if timestamp is None:
        raise ConfigError(f"'{checkpoint.path}' was saved with save_weights_only, and no training goes on from that.")
    return int(timestamp[_CLOCKS[unit]])


def _check_rate(checkpoint: Checkpoint) -> None:
    for now, full in zip(*checkpoint.learning_rates, strict=True):
        if now != full:
            raise ConfigError(
                f"The learning rate in '{checkpoint.path}' is {now:g}, and the optimizer's own is {full:g}: a cooldown "
                'starts where the schedule leaves that as it is, after the warmup and before any decay.',
            )


def _check_run_is_left_alone(config: TrainConfig, branched: TrainConfig) -> None:
    taken = _places(config)
    folders = [taken[key] for key in ('run_folder', 'save_folder') if key in taken]
    for key, place in _places(branched).items():
        if any(is_below(place, folder) for folder in folders) or is_below(place, taken.get(key, os.devnull)):
            raise ConfigError(f"{key} is '{place}', where the run itself writes: give the branch another, as {key}=...")


def _places(config: TrainConfig) -> dict[str, str]:
    """Where a run writes, by the keys of the settings."""
    places: dict[str, Any] = {'run_folder': config.run_folder, 'save_folder': config.save_folder}
    for kind in ('callbacks', 'loggers'):
        for name, arguments in (getattr(config, kind) or {}).items():
            places |= {f'{kind}.{name}.{key}': (arguments or {}).get(key) for key in _PLACES}
    return {
        key: place.replace('{run_name}', str(config.run_name))
        for key, place in places.items()
        if isinstance(place, str) and not is_uri(place)
    }


def _check_branch_is_the_same(branched: TrainConfig) -> None:
    """Checks that a branch which is gone on with has the schedule with which it began."""
    file = Path(str(branched.run_folder)) / CONFIG_FILE
    if not (branched.autoresume and file.is_file()):
        return
    begun = load_config(file)
    if begun.scheduler != branched.scheduler:
        raise ConfigError(
            f"'{branched.run_folder}' holds a branch with the schedule {begun.scheduler}, and this one has "
            f'{branched.scheduler}: give another run_folder and save_folder.',
        )
