# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

r"""Averages of checkpoints, computed tensor by tensor and piece by piece: every byte is read once, for all of them.

An average is a row of coefficients that sum to 1. A few are built up from the newest checkpoint to the oldest by steps
:math:`a \leftarrow a + w_i (\theta_i - a)`, where :math:`w_i` is the part that a coefficient has in the sum of those so
far. Many are a checkpoint plus a product of matrices, :math:`\theta_b + \sum_i s_i (\theta_i - \theta_{i+1})`, over the
checkpoints that weigh in it; :math:`s_i` is the sum of their coefficients up to the i-th, less 1 from the base b on.
Either way what training left alone comes out as it went in, and what weighs nothing in an average does not round it,
however large it is.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        copied (bool): Whether all are copies by choice, which may hold what is not finite. Default: ``False``.
    """

    name: str
    tensors: Sequence[LazyTensor]
    paths: Sequence[str]
    coefficients: np.ndarray
    copied: bool = False

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
        combination = (_Interpolations if len(self.sinks) <= _FEW else _Product)(job, self.size)
        size = combination.size
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
        self.size = size
        self._job = job
        self._checkpoints = range(job.coefficients.shape[1])
        copied = (job.coefficients != 0).sum(axis=1) == 1
        self._copies = [np.flatnonzero(copied & (job.coefficients[:, c] != 0)).tolist() for c in self._checkpoints]
        self._combined = np.flatnonzero(~copied).tolist()
        wide = any(tensor.dtype == torch.float64 for tensor in job.tensors)
        self._dtype = torch.float64 if wide else torch.float32
        if self._combined:
            self._prepare(job.coefficients[self._combined])

    def add(self, column: int, piece: torch.Tensor) -> list[int]:
        """Takes a checkpoint's piece, and returns the averages that it is already.

        Raises:
            ValueError: If there are some, and a value is not finite.
        """
        if self._combined:
            self._take(column, piece)
        if self._copies[column] and not self._job.copied and not _is_finite(piece):
            self._refuse(column)
        return self._copies[column]

    def results(self, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the other averages of the pieces, which were ``length`` elements long.

        Raises:
            ValueError: If a value is not finite.
        """
        if not self._combined:
            return
        results = self._finish(length)
        if not _is_finite(results):
            self._refuse_any()
        yield from zip(self._combined, results, strict=True)

    def _memory(self, rows: int) -> torch.Tensor:
        return torch.empty(rows * min(self.size, self._job.tensors[0].shape.numel()), dtype=self._dtype)

    @abstractmethod
    def _prepare(self, coefficients: np.ndarray) -> None:
        """Makes room for averages of these coefficients."""

    @abstractmethod
    def _take(self, column: int, piece: torch.Tensor) -> None:
        """Takes a checkpoint's piece."""

    @abstractmethod
    def _finish(self, length: int) -> torch.Tensor:
        """Returns the averages of the pieces, of the shape (averages, length)."""

    def _refuse_any(self) -> NoReturn:
        for column, tensor in enumerate(self._job.tensors):
            weighs = self._job.coefficients[self._combined, column].any()
            if weighs and not all(map(_is_finite, tensor.pieces(_LARGEST_PIECE))):
                self._refuse(column)
        raise ValueError(f"The average of the tensor '{self._job.name}' overflows.")

    def _refuse(self, column: int) -> NoReturn:
        raise ValueError(
            f"The tensor '{self._job.name}' in '{self._job.paths[column]}' holds a NaN or an infinity: leave that "
            f"checkpoint out, or take such tensors as they are (--copy '{self._job.name}')."
        )


class _Interpolations(_Combination):
    """Builds up each average step by step, while a piece is in cache: the faster way to a few of them."""

    def _prepare(self, coefficients: np.ndarray) -> None:
        self._weights = _step_weights(coefficients)
        self._results = self._memory(len(coefficients)).view(len(coefficients), -1)
        self._converted = self._memory(1)

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
    """Multiplies differences between checkpoints by the matrix of what these weigh: the faster way to many."""

    def _prepare(self, coefficients: np.ndarray) -> None:
        telescopes = [_telescope(row) for row in coefficients]
        places = _places(pair for _, weights in telescopes for pair in weights)
        matrix = [[weights.get(pair, 0) for pair in places] for _, weights in telescopes]
        self._weights = torch.tensor(matrix, dtype=torch.float64).to(self._dtype)
        self._bases: list[list[int]] = [[] for _ in self._checkpoints]
        for index, (base, _) in enumerate(telescopes):
            self._bases[base].append(index)
        # The values of a checkpoint are where the first of its differences goes, which is the last to be taken.
        own = {newer: place for (_, newer), place in reversed(places.items())}
        self._own = [own.get(column, 0) for column in self._checkpoints]
        self._differences: list[list[tuple[int, int]]] = [[] for _ in self._checkpoints]
        for (older, newer), place in places.items():
            self._differences[older].append((own[newer], place))
        self._shrink(1 + len(places) - len(self._checkpoints))
        self._operands, self._results = self._memory(1 + len(places)), self._memory(len(coefficients))

    def _shrink(self, more: int) -> None:
        """Makes the pieces smaller where averages of different checkpoints need more of them."""
        rows = _rows(len(self._checkpoints), len(self._job.coefficients))
        self.size = max(self.size * rows // (rows + max(more, 0)), 1)

    def _take(self, column: int, piece: torch.Tensor) -> None:
        operands, results = self._matrices(piece.numel())
        values = operands[self._own[column]].copy_(piece)
        for newer, difference in self._differences[column]:
            torch.sub(values, operands[newer], out=operands[difference])
        for index in self._bases[column]:
            results[index].copy_(values)

    def _finish(self, length: int) -> torch.Tensor:
        operands, results = self._matrices(length)
        return results.addmm_(self._weights, operands[1:])

    def _matrices(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        averages, differences = self._weights.shape
        operands = self._operands[: (1 + differences) * length].view(-1, length)
        return operands, self._results[: averages * length].view(-1, length)


def _telescope(row: np.ndarray) -> tuple[int, dict[tuple[int, int], float]]:
    r"""Returns a base b and weights s of pairs: an average is :math:`\theta_b + \sum s_{ij} (\theta_i - \theta_j)`.

    The pairs are of checkpoints that follow each other among those that weigh. The base is in the middle of the
    coefficients: the newest may weigh little and yet be larger than the average, if the weights grow, by any factor.
    """
    columns, sums = np.flatnonzero(row), np.cumsum(row[row != 0])
    base = int(np.max(np.flatnonzero(sums < 0.5), initial=-1)) + 1
    weights = sums[:-1] - (np.arange(len(columns) - 1) >= base)
    pairs = zip(columns[:-1].tolist(), columns[1:].tolist(), strict=True)
    return int(columns[base]), dict(zip(pairs, weights.tolist(), strict=True))


def _places(pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Returns where the differences of pairs (older, newer) go.

    Each newer one's last difference, that from the oldest, takes the place of its values, and comes before its others.
    The place 0 is for the values of checkpoints that are subtracted from none.
    """
    ordered = sorted(set(pairs))
    last = {newer: (older, newer) for older, newer in reversed(ordered)}
    return {pair: 1 + index for index, pair in enumerate(dict.fromkeys([*last.values(), *ordered]))}


def _step_weights(coefficients: np.ndarray) -> list[list[float]]:
    """Returns what each coefficient is of the sum of itself and those of newer checkpoints."""
    sums = np.cumsum(coefficients[:, ::-1], axis=1)[:, ::-1]
    # The newest checkpoints weigh positively in every average, and so does all that is newer than any.
    assert (sums[coefficients != 0] > 0).all()
    return np.divide(coefficients, sums, out=np.zeros_like(coefficients), where=coefficients != 0).tolist()


def _is_finite(values: torch.Tensor) -> bool:
    # The dtypes of eight bits have no arithmetic of their own.
    values = values.float() if values.dtype.itemsize == 1 else values
    # A sum is finite unless a value is not, or it overflows.
    return bool(values.sum().isfinite() or values.isfinite().all())


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
