# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A cooldown branch: a run at a constant learning rate goes on from a checkpoint, with a decay to the end, elsewhere.

One long run thus stands for runs of many lengths, each of which would need a schedule of its own (arXiv 2405.18392).
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from composer.core import Time, TimeUnit

from composer_bema.formats.completeness import saved_checkpoints, why_incomplete
from composer_bema.formats.composer import Checkpoint, open_checkpoint
from composer_bema.training.config import ConfigError, TrainConfig, load_config
from composer_bema.training.outputs import CONFIG_FILE, run_folder_of

__all__ = ['cooldown_config']

log = logging.getLogger(__name__)

# The clocks by which a duration can be counted, by their names in a checkpoint. Epochs are counted in steps.
_CLOCKS = {TimeUnit.BATCH: 'batch', TimeUnit.SAMPLE: 'sample', TimeUnit.TOKEN: 'token', TimeUnit.EPOCH: 'batch'}
# The settings that say where a run writes, and what callbacks and loggers call it.
_WHERE = ('run_folder', 'save_folder', 'callbacks', 'loggers')
_PLACES = ('save_folder', 'folder', 'filename', 'log_dir')


class Branch(NamedTuple):
    """Where a cooldown starts, and from when to when it goes."""

    checkpoint: Path
    start: Time
    end: Time

    @property
    def suffix(self) -> str:
        """What tells the branch from its run, and from other branches."""
        return f'-cooldown-{self.start}'


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
        ConfigError: The learning rate was not at its peak at the checkpoint, or the branch would write where its run
            has written.
        ValueError: The checkpoint is damaged.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f'fraction must lie between 0 and 1, the whole branch, but is {fraction}.')
    target = Path(target)
    folder = _run_folder(target)
    # The run may have been moved since it was trained.
    config = _in_folder(load_config(folder / CONFIG_FILE), folder)
    if at is not None and target != folder:
        raise ConfigError(
            f"'{target}' is one checkpoint, and leaves no choice of the step {at}: name its run's folder."
        )
    branch = _branch(target, config, fraction, at)
    branched = _in_folder(config, folder.with_name(folder.name + branch.suffix))
    changes = {
        'run_name': f'{config.run_name}{branch.suffix}',
        **{key: getattr(branched, key) for key in _WHERE},
        'max_duration': str(branch.end),
        'scheduler': {
            'name': 'warmup_stable_decay',
            't_decay': str(branch.end - branch.start),
            't_max': str(branch.end),
            'decay': decay,
        },
        'load_path': str(branch.checkpoint),
        'load_weights_only': False,
    }
    given = [f'{key}={json.dumps(value)}' for key, value in changes.items() if value is not None]
    branched = load_config(folder / CONFIG_FILE, [*given, *overrides])
    _check_run_is_left_alone(config, branched)
    log.info(
        "From '%s' the learning rate decays until %s; the branch is kept in '%s'.",
        branch.checkpoint,
        branch.end,
        branched.run_folder,
    )
    return branched


def _run_folder(target: Path) -> Path:
    """The folder of a run, or that of a checkpoint's run."""
    if not target.exists():
        raise FileNotFoundError(f"No such run or checkpoint: '{target}'.")
    folder = target if (target / CONFIG_FILE).is_file() else run_folder_of(target)
    if folder is None:
        raise ConfigError(
            f"'{target}' is no folder of a run and lies in none: there is no {CONFIG_FILE}. Train a YAML of its "
            'settings with load_path and scheduler: {name: warmup_stable_decay, ...}.',
        )
    return folder


def _in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    """Settings with all that lies in their run's folder moved to another one."""
    moved = {key: _moved(getattr(config, key), str(config.run_folder), str(folder)) for key in _WHERE}
    return dataclasses.replace(config, **moved)


def _branch(target: Path, config: TrainConfig, fraction: float, at: int | None) -> Branch:
    duration = Time.from_input(config.max_duration, 'ep')
    if duration.unit not in _CLOCKS:
        raise ConfigError(
            f"The run's max_duration is '{duration}', and a branch needs steps, samples, tokens or epochs."
        )
    unit = TimeUnit.BATCH if duration.unit == TimeUnit.EPOCH else duration.unit
    path = _checkpoint_of_run(config, unit, fraction, at) if (target / CONFIG_FILE).is_file() else target
    checkpoint = open_checkpoint(path)
    start = _position(checkpoint, unit)
    _check_rate(checkpoint)
    end = round(start / (1 - fraction))
    if end <= start:
        raise ConfigError(f"A cooldown over {fraction} of a branch from '{path}' has no step: give a larger fraction.")
    return Branch(path, Time(start, unit), Time(end, unit))


def _checkpoint_of_run(config: TrainConfig, unit: TimeUnit, fraction: float, at: int | None) -> Path:
    """A run's checkpoint of one step, or the last one from which a cooldown ends before the run did."""
    save_folder = Path(str(config.save_folder))
    whole = {
        saved.batch: saved.path for saved in sorted(saved_checkpoints(save_folder)) if not why_incomplete(saved.path)
    }
    if not whole:
        raise ConfigError(f"The run in '{config.run_folder}' has left no checkpoint in '{save_folder}': name one.")
    if at is not None:
        if at not in whole:
            nearest = min(whole, key=lambda step: abs(step - at))
            raise ConfigError(f"There is no checkpoint of step {at} in '{save_folder}'; the nearest is of {nearest}.")
        return whole[at]
    positions = {path: _position(open_checkpoint(path), unit) for path in whole.values()}
    start = (1 - fraction) * max(positions.values())
    early = [path for path, position in positions.items() if 0 < position <= start]
    if not early:
        raise ConfigError(
            f"A cooldown over {fraction} of the run in '{config.run_folder}' starts at {start:.0f}{unit.value}, before "
            f'its first checkpoint, of {min(positions.values())}{unit.value}: name one for a longer branch.',
        )
    return early[-1]


def _position(checkpoint: Checkpoint, unit: TimeUnit) -> int:
    timestamp = (checkpoint.timestamp or {}).get('Timestamp')
    if timestamp is None:
        raise ConfigError(f"'{checkpoint.path}' was saved with save_weights_only, and no training goes on from that.")
    return int(timestamp[_CLOCKS[unit]])


def _check_rate(checkpoint: Checkpoint) -> None:
    for now, peak in zip(*checkpoint.learning_rates, strict=True):
        if now != peak:
            raise ConfigError(
                f"The learning rate in '{checkpoint.path}' is {now:g}, and {peak:g} at its peak: a cooldown starts at "
                'the peak, after the warmup and before any decay.',
            )


def _moved(value: Any, folder: str, to: str) -> Any:
    """A setting with the paths in it that lie in one folder moved to the other."""
    if isinstance(value, Mapping):
        return {key: _moved(item, folder, to) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, folder, to) for item in value]
    if isinstance(value, str) and (value == folder or value.startswith(f'{folder}/')):
        return to + value.removeprefix(folder)
    return value


def _check_run_is_left_alone(config: TrainConfig, branched: TrainConfig) -> None:
    places = dict(_places(config))
    for key, place in _places(branched):
        if key in places and os.path.abspath(place) == os.path.abspath(places[key]) and '{run_name}' not in place:
            raise ConfigError(f"{key} is '{place}', where the run itself writes: give the branch another, as {key}=...")


def _places(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Where a run writes, by the keys of the settings."""
    yield 'run_folder', str(config.run_folder)
    if config.save_folder is not None:
        yield 'save_folder', config.save_folder
    for kind in ('callbacks', 'loggers'):
        for name, arguments in (getattr(config, kind) or {}).items():
            for key in _PLACES:
                if isinstance((arguments or {}).get(key), str):
                    yield f'{kind}.{name}.{key}', arguments[key]
