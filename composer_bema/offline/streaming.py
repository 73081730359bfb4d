# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

r"""Averages of checkpoints, computed tensor by tensor and piece by piece: every byte is read once, for all of them.

An average is a row of coefficients c that sum to 1, and so it is the last checkpoint plus a sum of differences,
:math:`\theta_n + \sum_i c_i (\theta_i - \theta_n)`. Computed like this it loses next to nothing to rounding, and what
training left alone comes out as it went in. The rows of all averages are one matrix, and a piece of all checkpoints is
another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import xxhash

from composer_bema.formats.safetensors_files import bytes_of
from composer_bema.formats.tensors import LazyTensor

__all__ = ['Digests', 'Job', 'Sink', 'scratch_bytes', 'stream_averages']

# Elements of a piece, and the memory that a thread may have for the pieces of all checkpoints and averages: large
# enough that reading is worth the call, small enough that they stay in cache between one operation and the next.
_LARGEST_PIECE = 128 * 1024
_SMALLEST_PIECE = 4 * 1024
_SCRATCH = 64 * 1024 * 1024

# XXH3 of a tensor's bytes by the index of its checkpoint and its name.
Digests = dict[tuple[int, str], str]


class Sink(Protocol):
    """Takes an average, piece by piece and in no order of tensors, from several threads."""

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Takes the values of a tensor from the element ``start`` on. They are overwritten afterwards."""
        ...


@dataclass(frozen=True)
class Job:
    """One tensor of all averages.

    Args:
        name (str): Its name.
        tensors (Sequence[LazyTensor]): It in each of the checkpoints, of one shape.
        paths (Sequence[str]): The checkpoints, for messages.
        coefficients (np.ndarray): Of the shape (averages, checkpoints); each row sums to 1. A row with a single one is
            a copy, to the bit.
    """

    name: str
    tensors: Sequence[LazyTensor]
    paths: Sequence[str]
    coefficients: np.ndarray

    @property
    def nbytes(self) -> int:
        """The bytes that are read."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)


def stream_averages(
    jobs: Sequence[Job], sinks: Sequence[Sink], threads: int, on_read: Callable[[int], object] = lambda count: None
) -> Digests:
    """Computes averages and returns the digests of what they were made of.

    Args:
        jobs (Sequence[Job]): The tensors.
        sinks (Sequence[Sink]): Where each of the averages goes.
        threads (int): How many tensors are worked on at a time.
        on_read (Callable[[int], object]): Is told of the bytes that have been read, by one thread at a time.

    Raises:
        ValueError: If a checkpoint is damaged, or a value is not finite.
    """
    # The largest first, so that no thread is left with one at the end.
    waiting = iter(sorted(jobs, key=lambda job: -job.nbytes))
    shared = _Shared(sinks, waiting, on_read)
    one_each = {'initializer': torch.set_num_threads, 'initargs': (1,)}
    with _restored_threads(), ThreadPoolExecutor(threads, **one_each) as pool:
        done = [pool.submit(shared.work) for _ in range(threads)]
        try:
            for future in done:
                future.result()
        finally:
            shared.stopped.set()
    return shared.digests


def scratch_bytes(num_checkpoints: int, num_averages: int, threads: int) -> int:
    """Returns the memory that pieces take, whatever the size of the model."""
    rows = num_checkpoints + num_averages
    return threads * rows * _piece(rows) * torch.float64.itemsize


class _Shared:
    """What the threads share: the tensors that wait, where results go, and whether to stop."""

    def __init__(self, sinks: Sequence[Sink], waiting: Iterator[Job], on_read: Callable[[int], object]) -> None:
        self.sinks = sinks
        self.waiting = waiting
        self.on_read = on_read
        self.digests: Digests = {}
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def work(self) -> None:
        """Works on one tensor after the other until there is none left, or another thread has failed."""
        try:
            while not self.stopped.is_set():
                with self._lock:
                    job = next(self.waiting, None)
                if job is None:
                    return
                self._average(job)
        except BaseException:
            self.stopped.set()
            raise

    def _average(self, job: Job) -> None:
        hashes = [xxhash.xxh3_64() for _ in job.tensors]
        combine = _Copies(job) if _is_copy(job.coefficients) else _Combination(job)
        size = _piece(sum(job.coefficients.shape))
        start = 0
        for pieces in zip(*(tensor.pieces(size) for tensor in job.tensors), strict=True):
            if self.stopped.is_set():
                return
            for piece, state in zip(pieces, hashes, strict=True):
                state.update(bytes_of(piece))
            for sink, values in zip(self.sinks, combine(pieces), strict=True):
                sink.write(job.name, start, values)
            start += pieces[0].numel()
            with self._lock:
                self.on_read(sum(piece.nbytes for piece in pieces))
        self.digests.update({(index, job.name): state.hexdigest() for index, state in enumerate(hashes)})


class _Copies:
    """Passes on the pieces of one checkpoint for each average."""

    def __init__(self, job: Job) -> None:
        self._columns = job.coefficients.argmax(axis=1).tolist()

    def __call__(self, pieces: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (pieces[column] for column in self._columns)


class _Combination:
    """Combines pieces, in fp32 or, where a checkpoint has it, in fp64."""

    def __init__(self, job: Job) -> None:
        self._job = job
        wide = any(tensor.dtype == torch.float64 for tensor in job.tensors)
        self._dtype = torch.float64 if wide else torch.float32
        # The last column is implied by the others.
        self._coefficients = torch.from_numpy(job.coefficients[:, :-1]).to(self._dtype)
        averages, checkpoints = job.coefficients.shape
        length = min(_piece(averages + checkpoints), job.tensors[0].shape.numel())
        self._operands = torch.empty(checkpoints * length, dtype=self._dtype)
        self._results = torch.empty(averages * length, dtype=self._dtype)

    def __call__(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        averages, checkpoints = self._job.coefficients.shape
        length = pieces[0].numel()
        operands = self._operands[: checkpoints * length].view(checkpoints, length)
        results = self._results[: averages * length].view(averages, length)
        *differences, last = operands.unbind()
        last.copy_(pieces[-1])
        for difference, piece in zip(differences, pieces, strict=False):
            if piece.dtype == self._dtype:
                torch.sub(piece, last, out=difference)
            else:
                difference.copy_(piece).sub_(last)
        torch.addmm(last.expand(averages, length), self._coefficients, operands[:-1], out=results)
        self._require_finite(results, pieces)
        return results

    def _require_finite(self, results: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
        # A sum is finite unless a value is not, or it overflows.
        if torch.isfinite(results.sum()) or torch.isfinite(results).all():
            return
        for piece, path in zip(pieces, self._job.paths, strict=True):
            if not torch.isfinite(piece).all():
                raise ValueError(
                    f"The tensor '{self._job.name}' in '{path}' holds a NaN or an infinity: leave that checkpoint out, "
                    f"or take such tensors from the last one (--copy '{self._job.name}')."
                )
        raise ValueError(f"The average of the tensor '{self._job.name}' overflows.")


def _is_copy(coefficients: np.ndarray) -> bool:
    return bool((np.sort(coefficients, axis=1) == np.eye(1, coefficients.shape[1], coefficients.shape[1] - 1)).all())


def _piece(rows: int) -> int:
    fitting = _SCRATCH // (rows * torch.float32.itemsize)
    return min(max(fitting, _SMALLEST_PIECE), _LARGEST_PIECE) // 1024 * 1024


@contextlib.contextmanager
def _restored_threads() -> Iterator[None]:
    """Undoes that a thread's number of threads is also that of all threads to come."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
