# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A run's checkpoints in order, and the averages that are computed of them in one reading."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from composer_bema.formats.composer import MODEL, TRAINING
from composer_bema.formats.tensors import TensorSpec
from composer_bema.offline.checkpoints import Source, find_checkpoints, open_initial_model, open_sources
from composer_bema.offline.plan import Average, plan_averages
from composer_bema.offline.ranks import is_first_rank, share_out, union
from composer_bema.offline.settings import Setting
from composer_bema.offline.streaming import Job, Sink, scratch_bytes, stream_averages

__all__ = ['Reading', 'Trajectory']

# The rows of coefficients that an average has.
_KINDS = ('coefficients', 'statistics')
# What a checkpoint's own are called in manifests.
_KEYS = {'coefficients': 'coefficient', 'statistics': 'coefficient_of_statistics'}

# BatchNorm's, by the names that torch gives them in every model; what a checkpoint holds does not say what is a buffer.
_STATISTICS = re.compile(r'(?:.*\.)?running_(?:mean|var)')


class Trajectory:
    """The checkpoints of a run.

    Args:
        checkpoints (str | Path): The directory that they are in.
        initial_model (str, optional): The weights before the first step: a folder, a file, or a name on the hub.
        weights (str): Of Composer checkpoints the ``'training'`` weights or what the ``'model'`` holds.
        copy (Sequence[str]): Patterns, such as ``'*.rotary_emb.*'``, of the names of tensors that are not averaged but
            taken from the checkpoint of the average's own step. What is no floating-point number always is.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If there are no checkpoints in it, two of one step, or no such weights to choose.
    """

    def __init__(
        self,
        checkpoints: Union[str, Path],
        *,
        initial_model: Optional[str] = None,
        weights: str = TRAINING,
        copy: Sequence[str] = (),
    ) -> None:
        if weights not in (TRAINING, MODEL):
            raise ValueError(f"weights must be '{TRAINING}' or '{MODEL}', not {weights!r}.")
        self._found = find_checkpoints(checkpoints)
        self._initial_model = initial_model
        self._weights = weights
        self._copy = (copy,) if isinstance(copy, str) else tuple(copy)
        if initial_model is not None and self._found[0].step == 0:
            raise ValueError(
                f"'{self._found[0].path}' is of step 0, and '{initial_model}' is named as the initial model: give one."
            )

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, rising; 0 is that of the initial model."""
        initial = [] if self._initial_model is None else [0]
        return initial + [found.step for found in self._found]

    def plan(self, setting: Setting, at: Sequence[int] = ()) -> list[Average]:
        """Returns the averages of a setting at some steps, by default the last one."""
        return plan_averages(setting, self.steps, at)

    def open(self, averages: Sequence[Average]) -> Reading:
        """Opens the checkpoints that averages are made of.

        Raises:
            FileNotFoundError: If there is no such initial model.
            ValueError: If a checkpoint is damaged or holds an average, they differ in their tensors, or a pattern of
                what is to be copied fits nothing.
        """
        used = sorted({index for average in averages for index in self._used(average)})
        steps = self.steps
        found = {checkpoint.step: checkpoint for checkpoint in self._found}
        sources = open_sources([found[steps[index]] for index in used if steps[index] in found], self._weights)
        if steps[used[0]] not in found:
            assert self._initial_model is not None
            sources.insert(0, open_initial_model(self._initial_model, sources[-1]))
        return Reading(sources, averages, used, self._copy)

    def _used(self, average: Average) -> list[int]:
        weighs = (average.coefficients != 0) | (average.statistics != 0)
        # What is copied comes from the checkpoint of the average's own step.
        return [*np.flatnonzero(weighs).tolist(), self.steps.index(average.step)]


class Reading:
    """Opened checkpoints, of which averages can be computed.

    Args:
        sources (Sequence[Source]): The checkpoints, by their steps.
        averages (Sequence[Average]): The averages.
        columns (Sequence[int]): Where each of the checkpoints is in the averages' coefficients.
        copy (Sequence[str]): Patterns of names that are copied.
    """

    def __init__(
        self, sources: Sequence[Source], averages: Sequence[Average], columns: Sequence[int], copy: Sequence[str]
    ) -> None:
        self.sources = sources
        self.averages = averages
        self._columns = list(columns)
        self._copied = _copied_names(sources[-1], copy)
        self._digests: list[str] = []

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors that are read."""
        return sum(tensor.spec.nbytes for source in self.sources for tensor in source.tensors.values())

    def source_of(self, average: Average) -> Source:
        """Returns the checkpoint of an average's own step."""
        return next(source for source in self.sources if source.step == average.step)

    def specs(self, average: Average, dtype: Optional[torch.dtype] = None) -> dict[str, TensorSpec]:
        """Returns what an average's tensors are: as in the checkpoint of its step, but for the dtype of those averaged.

        Args:
            average (Average): The average.
            dtype (torch.dtype, optional): The dtype. Default: the checkpoint's.
        """
        return {
            name: TensorSpec(tensor.shape, tensor.dtype if dtype is None or name in self._copied else dtype)
            for name, tensor in self.source_of(average).tensors.items()
        }

    def compute(self, sinks: Sequence[Sink], threads: int, show_progress: bool = False) -> None:
        """Computes the averages; of several ranks each its share.

        Args:
            sinks (Sequence[Sink]): Where each of the averages goes.
            threads (int): How many tensors each rank works on at a time.
            show_progress (bool): Whether to draw a bar, on the first rank. Default: ``False``.

        Raises:
            ValueError: If a checkpoint is damaged, or a value is not finite.
        """
        jobs = self._jobs()
        mine = share_out(jobs, [job.nbytes for job in jobs])
        total = sum(job.nbytes for job in mine)
        hidden = not show_progress or not is_first_rank()
        with tqdm(total=total, unit='B', unit_scale=True, desc='reading', disable=hidden) as bar:
            part = stream_averages(mine, sinks, threads, bar.update)
        digests = union(part)
        self._digests = [_digest({n: digests[i, n] for n in source.tensors}) for i, source in enumerate(self.sources)]

    def scratch_bytes(self, threads: int) -> int:
        """Returns the memory that computing takes on each rank, beside that of the sinks."""
        return scratch_bytes(len(self.sources), len(self.averages), threads)

    def manifest(self, average: Average, dtype: Optional[str] = None) -> dict[str, Any]:
        """Returns how an average was made, once it has been.

        Args:
            average (Average): The average.
            dtype (str, optional): The dtype that was chosen for it.
        """
        return {
            'rule': average.setting.rule,
            'settings': average.setting.effective,
            'update_freq': average.setting.update_freq,
            'update_after': average.setting.update_after,
            'step': average.step,
            'dtype': dtype,
            'checkpoints': self._weighing(average),
            'copied': sorted(self._copied),
        }

    def _weighing(self, average: Average) -> list[dict[str, Any]]:
        """Returns the checkpoints that an average was made of, and what each has weighed."""
        rows = {kind: getattr(average, kind)[self._columns].tolist() for kind in _KINDS}
        has_statistics = any(self._kind(name) == 'statistics' for name in self.sources[-1].tensors)
        if not has_statistics or rows['statistics'] == rows['coefficients']:
            del rows['statistics']
        checkpoints = []
        for index, (source, digest) in enumerate(zip(self.sources, self._digests, strict=True)):
            weights = {_KEYS[kind]: row[index] for kind, row in rows.items()}
            if any(weights.values()) or source.step == average.step:
                taken = {} if source.weights is None else {'weights': source.weights}
                described = {'step': source.step, 'path': str(source.path), **taken, 'bytes': source.size}
                checkpoints.append({**described, 'xxh3_64': digest, **weights})
        return checkpoints

    def _jobs(self) -> list[Job]:
        rows = {kind: np.stack([getattr(a, kind)[self._columns] for a in self.averages]) for kind in _KINDS}
        rows['copied'] = np.stack([[float(s.step == a.step) for s in self.sources] for a in self.averages])
        paths = [str(source.path) for source in self.sources]
        return [
            Job(
                name,
                [source.tensors[name] for source in self.sources],
                paths,
                rows[self._kind(name)],
                copied=name in self._copied,
            )
            for name in self.sources[-1].tensors
        ]

    def _kind(self, name: str) -> str:
        if name in self._copied:
            return 'copied'
        return 'statistics' if _STATISTICS.fullmatch(name) else 'coefficients'


def _copied_names(source: Source, patterns: Sequence[str]) -> set[str]:
    copied = {name for name, tensor in source.tensors.items() if not tensor.dtype.is_floating_point}
    for name, tensor in source.tensors.items():
        if tensor.dtype.is_complex and not any(fnmatchcase(name, pattern) for pattern in patterns):
            raise ValueError(
                f"The tensor '{name}' in '{source.path}' is complex, which is not averaged: --copy '{name}' takes it "
                "from the checkpoint of the average's step."
            )
    for pattern in patterns:
        matching = {name for name in source.tensors if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"The pattern '{pattern}' of what is to be copied fits no tensor of '{source.path}'.")
        copied |= matching
    return copied


def _digest(tensors: dict[str, str]) -> str:
    """Returns the digest of a checkpoint from its tensors', whatever their order."""
    return xxhash.xxh3_64_hexdigest('\n'.join(f'{name} {tensors[name]}' for name in sorted(tensors)))
