# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Who computes an update: the caller, or a worker thread where the buffers are in host memory and the weights on a GPU.

Of such an update the training waits for a copying of the weights to the host:

- The copying runs on the training's own stream, so that whatever writes to the weights next, the optimizer or a forward
  pass that moves statistics, comes after it. A stream of its own could overlap it with the next forward and backward
  pass, but would have to be waited for before that write, and in a hand-written loop nothing says when it comes.
- There is room for one copy of the weights, in their dtype and in pinned memory, so one update is in flight at most.
- The worker applies the kernel of the CPU to the copy, so that the numbers are those of an update on the CPU. It has as
  many of torch's threads as the caller (``OMP_NUM_THREADS``, of which torchrun makes 1). An update that takes longer
  than the time to the next one makes that wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Optional

import torch

from composer_bema.averaging import kernels
from composer_bema.averaging.rules import LinearStep

__all__ = ['Update', 'Updater']


class Update(NamedTuple):
    """What an update does to the tensors that share a rule; the arguments of :func:`.apply_step`."""

    step: LinearStep
    theta: Sequence[torch.Tensor]
    buffers: Mapping[str, Sequence[torch.Tensor]]


class Updater:
    """Applies updates, one after the other.

    Whoever reads the buffers calls :meth:`wait` first. A copy of it, pickled or not, has nothing in flight.
    """

    def __init__(self) -> None:
        self._staging = Staging()
        # The worker is started when it is needed, and ends with the updater, or with the process once its work is done.
        self._worker: Optional[ThreadPoolExecutor] = None
        # The newest update of the worker, or one that failed, which stays here as long as the buffers are those.
        self._newest: Optional[Future[None]] = None

    def __reduce__(self) -> tuple[type[Updater], tuple[()]]:
        return Updater, ()

    def apply(self, updates: Sequence[Update]) -> None:
        """Applies updates, or has them applied from the weights as they are now.

        Raises:
            RuntimeError: If the last ones failed.
            BaseException: What these fail with, unless a worker applies them.
        """
        self.wait()
        if not is_offloaded(updates):
            self._apply_here(updates)
            return
        copies, await_copies = self._staging.copy([tensor for update in updates for tensor in update.theta])
        remaining = iter(copies)
        staged = [update._replace(theta=[next(remaining) for _ in update.theta]) for update in updates]
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix='weight-averaging')
        modes = torch.get_num_threads(), torch.is_inference_mode_enabled()
        self._newest = self._worker.submit(_apply_when_copied, staged, await_copies, *modes)

    def _apply_here(self, updates: Sequence[Update]) -> None:
        try:
            _apply(updates)
        except BaseException as error:
            self._newest = Future()
            # The error itself would keep its frames, and all that is in them.
            self._newest.set_exception(RuntimeError(f'{type(error).__name__}: {error}'))
            raise

    def wait(self) -> None:
        """Waits for the worker.

        Raises:
            RuntimeError: If updates have failed, here or there, every time until :meth:`forget`.
        """
        self.settle()
        error = None if self._newest is None else self._newest.exception()
        if error is not None:
            raise RuntimeError(
                f'The last update failed, so that a part of the average may lack it ({error!r}): load a '
                'checkpoint from before it, or start the average anew.',
            ) from error
        self._newest = None

    def settle(self) -> None:
        """Waits for the worker, whatever becomes of its updates."""
        if self._newest is not None:
            self._newest.exception()

    def forget(self) -> None:
        """Waits for the worker, and forgets if its updates failed: the buffers are no longer those."""
        self.settle()
        self._newest = None


class Staging:
    """Room in pinned host memory for one copy of the weights. All that is CUDA's about an update is here."""

    def __init__(self) -> None:
        self._room: list[torch.Tensor] = []

    @torch.no_grad()
    def copy(self, weights: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Callable[[], None]]:
        """Begins to copy weights to the host, after the kernels that write to them and before those that are to come.

        Args:
            weights (Sequence[torch.Tensor]): The weights, on any devices.

        Returns:
            tuple[Sequence[torch.Tensor], Callable[[], None]]: Where the values will be until the next call, and what
            waits for them, from any thread.
        """
        self._make_room(weights)
        for kept, weight in zip(self._room, weights, strict=True):
            kept.copy_(weight, non_blocking=True)
        # A thread that spins until its event comes would take a core from the data loader.
        events = {device: torch.cuda.Event(blocking=True) for device in {w.device for w in weights if w.is_cuda}}
        for device, event in events.items():
            event.record(torch.cuda.current_stream(device))

        def await_copies() -> None:
            for device, event in events.items():
                # Or a thread that is new to CUDA would wake the first GPU for it.
                with torch.cuda.device(device):
                    event.synchronize()

        return self._room, await_copies

    def _make_room(self, weights: Sequence[torch.Tensor]) -> None:
        if [(kept.shape, kept.dtype) for kept in self._room] != [(weight.shape, weight.dtype) for weight in weights]:
            # What there was goes first, or there would be two copies.
            self._room = []
            # In inference mode it could be written to in no other.
            with torch.inference_mode(False):
                self._room = [pinned_like(weight) for weight in weights]


def is_offloaded(updates: Sequence[Update]) -> bool:
    """Returns whether all buffers are in host memory, and weights on a GPU."""
    kept = (tensor for update in updates for tensors in update.buffers.values() for tensor in tensors)
    return any(t.is_cuda for u in updates for t in u.theta) and all(tensor.device.type == 'cpu' for tensor in kept)


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns pinned host memory of the shape, dtype and layout of a tensor, which a GPU copies to by itself."""
    return torch.empty_like(tensor, device='cpu', pin_memory=True)


def _apply(updates: Sequence[Update]) -> None:
    for update in updates:
        kernels.apply_step(*update)


def _apply_when_copied(
    updates: Sequence[Update], await_copies: Callable[[], None], threads: int, in_inference_mode: bool
) -> None:
    # A new thread would have what the whole process was told last, which is 1 while another average is being updated.
    torch.set_num_threads(threads)
    await_copies()
    with torch.inference_mode(in_inference_mode):
        _apply(updates)
