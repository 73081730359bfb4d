# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

r"""Averages of checkpoints, computed tensor by tensor and piece by piece: every byte is read once, for all of them.

An average is a row of coefficients that sum to 1. A few are built up from the newest checkpoint to the oldest by steps
:math:`a \leftarrow a + w_i (\theta_i - a)`, where :math:`w_i` is the part that a coefficient has in the sum of those so
far. Many are the newest checkpoint plus a product of matrices, :math:`\theta_n + \sum_i c_i (\theta_i - \theta_n)`.
Either way what training left alone comes out as it went in.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
import torch
import xxhash

from composer_bema.formats.safetensors_files import bytes_of
from composer_bema.formats.tensors import LazyTensor

__all__ = ['Digests', 'Job', 'Sink', 'scratch_bytes', 'stream_averages']

# Elements of a piece: so many that reading them is worth the call, so few that they are in cache when they are used.
_LARGEST_PIECE = 512 * 1024
_SMALLEST_PIECE = 16 * 1024
# The memory that a thread takes for what it combines, unless the smallest pieces take more.
_SCRATCH = 64 * 1024 * 1024
# Up to so many averages it is faster to go without the matrices.
_FEW = 2

# Bytes for an element of a piece, of any dtype.
_MEMORY = 16

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
            a copy, to the bit and of any dtype.
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
    num_checkpoints = max((len(job.tensors) for job in jobs), default=0)
    shared = _Shared(sinks, waiting, on_read, _piece(_rows(num_checkpoints, len(sinks))))
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
    """Returns the memory that computing takes, whatever the size of the model; twice that for fp64 weights."""
    rows = _rows(num_checkpoints, num_averages)
    return threads * _piece(rows) * (rows * torch.float32.itemsize + _MEMORY)


class _Shared:
    """What the threads share: the tensors that wait, where results go, and whether to stop."""

    def __init__(
        self, sinks: Sequence[Sink], waiting: Iterator[Job], on_read: Callable[[int], object], size: int
    ) -> None:
        self.sinks = sinks
        self.waiting = waiting
        self.on_read = on_read
        self.size = size
        self.digests: Digests = {}
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def work(self) -> None:
        """Works on one tensor after the other until there is none left, or another thread has failed."""
        memory = torch.empty(self.size * _MEMORY, dtype=torch.uint8)
        try:
            while not self.stopped.is_set():
                with self._lock:
                    job = next(self.waiting, None)
                if job is None:
                    return
                self._average(job, memory)
        except BaseException:
            self.stopped.set()
            raise

    def _average(self, job: Job, memory: torch.Tensor) -> None:
        hashes = [xxhash.xxh3_64() for _ in job.tensors]
        size = self.size
        combination = (_Interpolations if len(self.sinks) <= _FEW else _Product)(job, size)
        streams = [tensor.pieces(size, memory) for tensor in job.tensors]
        numel = job.tensors[0].shape.numel()
        for start in range(0, numel, size):
            if self.stopped.is_set():
                return
            # A piece is made use of while it is in cache, and then its memory is the next one's.
            for column in reversed(range(len(streams))):
                piece = next(streams[column])
                hashes[column].update(bytes_of(piece))
                for index in combination.add(column, piece):
                    self.sinks[index].write(job.name, start, piece)
            for index, values in combination.results(min(size, numel - start)):
                self.sinks[index].write(job.name, start, values)
            with self._lock:
                self.on_read(sum(tensor.dtype.itemsize for tensor in job.tensors) * min(size, numel - start))
        for stream in streams:
            # Some know only at their end that they were damaged.
            next(stream, None)
        self.digests.update({(index, job.name): state.hexdigest() for index, state in enumerate(hashes)})


class _Combination(ABC):
    """Combines pieces of one tensor, given from the newest checkpoint on; in fp32, or in fp64 if one of them has it."""

    def __init__(self, job: Job, size: int) -> None:
        self._job = job
        self._checkpoints = range(job.coefficients.shape[1])
        copied = (job.coefficients != 0).sum(axis=1) == 1
        self._copies = [np.flatnonzero(copied & (job.coefficients[:, c] != 0)).tolist() for c in self._checkpoints]
        self._combined = np.flatnonzero(~copied).tolist()
        wide = any(tensor.dtype == torch.float64 for tensor in job.tensors)
        self._dtype = torch.float64 if wide else torch.float32
        self._length = min(size, job.tensors[0].shape.numel())
        self._prepare(job.coefficients[self._combined])

    def add(self, column: int, piece: torch.Tensor) -> list[int]:
        """Takes a checkpoint's piece, and returns the averages that it is already."""
        if self._combined:
            self._take(column, piece)
        return self._copies[column]

    def results(self, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the other averages of the pieces, which were ``length`` elements long.

        Raises:
            ValueError: If a value is not finite.
        """
        if not self._combined:
            return
        results = self._finish(length)
        # A sum is finite unless a value is not, or it overflows.
        if not torch.isfinite(results.sum()) and not torch.isfinite(results).all():
            self._refuse()
        yield from zip(self._combined, results, strict=True)

    @abstractmethod
    def _prepare(self, coefficients: np.ndarray) -> None:
        """Makes room for averages of these coefficients."""

    @abstractmethod
    def _take(self, column: int, piece: torch.Tensor) -> None:
        """Takes a checkpoint's piece."""

    @abstractmethod
    def _finish(self, length: int) -> torch.Tensor:
        """Returns the averages of the pieces, of the shape (averages, length)."""

    def _refuse(self) -> NoReturn:
        for tensor, path in zip(self._job.tensors, self._job.paths, strict=True):
            if not all(torch.isfinite(piece).all() for piece in tensor.pieces(_LARGEST_PIECE)):
                raise ValueError(
                    f"The tensor '{self._job.name}' in '{path}' holds a NaN or an infinity: leave that checkpoint out, "
                    f"or take such tensors as they are (--copy '{self._job.name}')."
                )
        raise ValueError(f"The average of the tensor '{self._job.name}' overflows.")


class _Interpolations(_Combination):
    """Builds up each average step by step, while a piece is in cache: the faster way to a few of them."""

    def _prepare(self, coefficients: np.ndarray) -> None:
        self._weights = _step_weights(coefficients)
        self._results = torch.empty(len(coefficients), self._length, dtype=self._dtype)
        self._converted = torch.empty(self._length, dtype=self._dtype)

    def _take(self, column: int, piece: torch.Tensor) -> None:
        if piece.dtype != self._dtype:
            piece = self._converted[: piece.numel()].copy_(piece)
        for result, weights in zip(self._results, self._weights, strict=True):
            weight = weights[column]
            # The newest that weighs has nothing before it.
            if weight == 1:
                result[: piece.numel()].copy_(piece)
            elif weight != 0:
                result[: piece.numel()].lerp_(piece, weight)

    def _finish(self, length: int) -> torch.Tensor:
        return self._results[:, :length]


class _Product(_Combination):
    """Multiplies differences from the newest checkpoint by the matrix of coefficients: the faster way to many."""

    def _prepare(self, coefficients: np.ndarray) -> None:
        # That of the newest is implied by the others.
        self._coefficients = torch.from_numpy(coefficients[:, :-1]).to(self._dtype)
        self._operands = torch.empty(len(self._checkpoints) * self._length, dtype=self._dtype)
        self._results = torch.empty(len(coefficients) * self._length, dtype=self._dtype)

    def _take(self, column: int, piece: torch.Tensor) -> None:
        operands = self._operands_of(piece.numel())
        newest, difference = operands[-1], operands[column]
        if column == len(operands) - 1:
            newest.copy_(piece)
        elif piece.dtype == self._dtype:
            torch.sub(piece, newest, out=difference)
        else:
            difference.copy_(piece).sub_(newest)

    def _finish(self, length: int) -> torch.Tensor:
        operands = self._operands_of(length)
        results = self._results[: len(self._coefficients) * length].view(-1, length)
        return torch.addmm(operands[-1].expand_as(results), self._coefficients, operands[:-1], out=results)

    def _operands_of(self, length: int) -> torch.Tensor:
        return self._operands[: len(self._checkpoints) * length].view(-1, length)


def _step_weights(coefficients: np.ndarray) -> list[list[float]]:
    """Returns what each coefficient is of the sum of itself and those of newer checkpoints."""
    sums = np.cumsum(coefficients[:, ::-1], axis=1)[:, ::-1]
    # The newest checkpoints weigh positively in every average, and so does all that is newer than any.
    assert (sums[coefficients != 0] > 0).all()
    return np.divide(coefficients, sums, out=np.zeros_like(coefficients), where=coefficients != 0).tolist()


def _rows(num_checkpoints: int, num_averages: int) -> int:
    """Returns how many pieces are in memory at a time."""
    return num_averages + (2 if num_averages <= _FEW else num_checkpoints)


def _piece(rows: int) -> int:
    return max(min(_SCRATCH // (rows * torch.float32.itemsize), _LARGEST_PIECE), _SMALLEST_PIECE)


@contextlib.contextmanager
def _restored_threads() -> Iterator[None]:
    """Undoes that a thread's number of threads is also that of all threads to come."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
