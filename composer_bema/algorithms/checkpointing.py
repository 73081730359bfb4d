# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How averages go into Composer's checkpoints and come out of them, monolithic and sharded, and what is refused.

Composer pickles what algorithms return for a sharded checkpoint as one blob of rank 0, so that the shards of other
ranks would be lost. What callbacks return is stored as the model is. So a callback, which is in every run that has an
average, keeps them, in monolithic checkpoints too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol

import torch.distributed.checkpoint as dcp
from composer import Logger, State
from composer.utils import FSDP2Config, dist, maybe_create_object_store_from_uri, parse_uri, partial_format
from composer.utils.checkpoint import DistCPObjectStoreReader
from composer.utils.file_helpers import extract_path_from_symlink

from composer_bema.algorithms.savers import AfterSavers, Swappable
from composer_bema.averaging.saving import MODEL_HOLDS
from composer_bema.formats.composer import open_checkpoint
from composer_bema.formats.entries import load_sharded_entries, pack_entry, unpack_entry

__all__ = ['AveragingCheckpoint', 'check_entry_of_composers_ema']

log = logging.getLogger(__name__)

_BY_COMPOSERS_EMA = (
    "written by Composer's own EMA, and its model then holds the averaged weights: resume it with "
    'composer.algorithms.EMA, or start a new run from the average with load_weights_only=True.'
)


class Restorable(Swappable, Protocol):
    """What this module needs of an average."""

    state_in_checkpoint: bool
    was_in_loaded_model: bool

    def saved_state(self) -> dict[str, Any]:
        """Returns the tensors and plain values to save."""
        ...

    def restore(self, saved: dict[str, Any], state: State) -> None:
        """Goes on from what `saved_state` returned; the model holds the weights that were saved beside it."""
        ...


class AveragingCheckpoint(AfterSavers):
    """Keeps the averages of a run in its checkpoints, and which of them the checkpoint's model holds.

    While a checkpoint is being loaded it has no state, so that it asks for nothing that the checkpoint may lack.

    Args:
        averages (Sequence[Restorable]): The averages of the run, of different classes.
        state (State): The run.
    """

    def __init__(self, averages: Sequence[Restorable], state: State) -> None:
        super().__init__(averages)
        self._averages: Sequence[Restorable] = averages
        self._run = state
        self._is_loading = False
        self._loaded: Optional[dict[str, Any]] = None

    def state_dict(self) -> dict[str, Any]:
        if self._is_loading:
            # Composer asks for memory to load a sharded checkpoint into. What it has of ours is read after that.
            return {}
        holder = next((average for average in self._averages if average.swapped_for), None)
        return {
            MODEL_HOLDS: 'training' if holder is None else type(holder).__name__,
            **{
                type(average).__name__: pack_entry(
                    average.saved_state(),
                    as_shards=self._run.fsdp_sharded_state_dict_enabled,
                )
                for average in self._averages
                if average.state_in_checkpoint
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the entries until the model's weights are loaded and stand on their devices."""
        self._loaded = state

    def before_load(self, state: State, logger: Logger) -> None:
        self._is_loading = True

    def after_load(self, state: State, logger: Logger) -> None:
        entries, self._loaded = self._loaded, None
        self._is_loading = False
        _check_that_all_ranks_loaded(state)
        if entries is not None and state.fsdp_sharded_state_dict_enabled:
            entries = _sharded_entries(state)
        restored = {'training'}
        for average in self._averages:
            name = type(average).__name__
            if entries is not None and name in entries:
                _restore(average, entries[name], state)
                restored.add(name)
            elif state.load_path is not None:
                log.info('No %s average was loaded: a new one starts from the loaded weights.', name)
        holder = 'training' if entries is None else entries.get(MODEL_HOLDS, 'training')
        # Known from the algorithms too, in case that the callbacks' entries were not loaded.
        holder = next((type(average).__name__ for average in self._averages if average.was_in_loaded_model), holder)
        if holder not in restored:
            raise ValueError(
                f'The model in the checkpoint holds the {holder} weights, and no training weights were loaded with '
                f'it: resume with {holder} among the algorithms and its state in the checkpoint, or start a new run '
                'from the average with load_weights_only=True.',
            )
        if restored == {'training'} and state.load_path is not None and state.timestamp.batch > 0:
            _check_that_composers_ema_is_not_resumed(state.load_path, state.run_name)


def check_entry_of_composers_ema(saved: dict[str, Any]) -> None:
    """Checks what a checkpoint has under the name of one of our algorithms that Composer has too.

    Raises:
        ValueError: If it is of Composer's own EMA and the model beside it is that average, which nobody may train on
            from unawares.
    """
    if 'ema_model' not in saved:
        return
    if saved.get('ema_weights_active'):
        raise ValueError(f"The checkpoint's 'EMA' entry was {_BY_COMPOSERS_EMA}")
    warnings.warn("The checkpoint's 'EMA' entry was written by Composer's own EMA and is not loaded.", stacklevel=2)


def _check_that_composers_ema_is_not_resumed(load_path: str, run_name: str) -> None:
    """Looks into a checkpoint with none of our averages: Composer shows no algorithm what others have saved."""
    path = partial_format(load_path, run_name=run_name)
    store, _, _ = parse_uri(path)
    if store:
        warnings.warn(
            f"'{path}' has none of this run's averages, and is not looked into where it is: it may have been "
            f'{_BY_COMPOSERS_EMA}',
            stacklevel=2,
        )
        return
    found = [dist.get_global_rank() == 0 and _holds_composers_ema(path)]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        raise ValueError(f"'{path}' was {_BY_COMPOSERS_EMA}")


def _holds_composers_ema(path: str) -> bool:
    try:
        return open_checkpoint(path).holds_composers_ema
    except (OSError, ValueError) as error:
        # Composer could read it, and reads more than is safe: pickles of whatever the run has put there.
        log.info("Whether the model in '%s' is an average cannot be told: %s", path, error)
        return False


def _check_that_all_ranks_loaded(state: State) -> None:
    # Composer sets sync_module_states itself where it has given rank 0's weights to the others.
    config = state.fsdp_config
    is_shared = not isinstance(config, FSDP2Config) or config.sync_module_states or dist.get_world_size() == 1
    if state.load_path is not None and state.load_monolith_rank0_only and not is_shared:
        raise ValueError(
            f"Rank 0 alone has the weights of '{state.load_path}': with load_monolith_rank0_only Composer's FSDP2 "
            'gives them to the other ranks only where the model is on the meta device, so build it there, or set '
            'load_monolith_rank0_only to False.',
        )


def _restore(average: Restorable, entry: dict[str, Any], state: State) -> None:
    try:
        average.restore(unpack_entry(entry), state)
    except (ValueError, KeyError) as error:
        reason = str(error) if isinstance(error, ValueError) else f'it lacks {error}'
        raise ValueError(
            f"The {type(average).__name__} average in '{state.load_path}' cannot be restored: {reason}",
        ) from error


def _sharded_entries(state: State) -> dict[str, Any]:
    try:
        with _sharded_reader(state) as reader:
            return load_sharded_entries(reader, state.model)
    except (dcp.api.CheckpointException, OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"The averages in '{state.load_path}' cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        # The first of the ranks that failed; its own text has all their tracebacks.
        error, _ = next(iter(error.failures.values()))
    text = ' '.join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) else f'{type(error).__name__}: {text}'


@contextlib.contextmanager
def _sharded_reader(state: State) -> Iterator[dcp.StorageReader]:
    """Opens the sharded checkpoint that the run was loaded from, as Composer's loader does."""
    assert state.load_path is not None, 'a checkpoint has been loaded'
    path = partial_format(state.load_path, run_name=state.run_name)
    store = maybe_create_object_store_from_uri(path)
    if store is None:
        if not os.path.exists(path):
            raise FileNotFoundError('a load_object_store is not handed on to callbacks, so give load_path as a URI.')
        yield dcp.FileSystemReader(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        # One download for the ranks of a node.
        folder = dist.all_gather_object(folder)[dist.get_global_rank() - dist.get_local_rank()]
        _, _, source = parse_uri(path)
        if source.endswith('.symlink'):
            source = extract_path_from_symlink(source, object_store=store)
        yield DistCPObjectStoreReader(source, str(Path(folder) / 'checkpoint'), store, state.device_mesh)
        dist.barrier()
