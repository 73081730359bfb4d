# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The mean of the latest weights as a Composer Algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from composer import State, Time

from composer_bema.algorithms.times import parse_update_freq
from composer_bema.algorithms.weight_averaging import SaveWeights, WeightAveraging
from composer_bema.averaging.defaults import DEFAULTS
from composer_bema.averaging.state import NonFinite
from composer_bema.averaging.windows import Window

__all__ = ['LAWA']


class LAWA(WeightAveraging):
    r"""Evaluates and checkpoints a run with the mean of its latest weights (arXiv 2209.14981, 2306.03241).

    A snapshot of the weights is taken at every update, and the average is the mean of the last ``window`` of them:

    .. math::
        LAWA_t = \frac{1}{M} \sum_{k=0}^{M-1} \theta_{t - k \phi}

    and of as many as there are before the window is full. It keeps the snapshots in the model's dtype and their mean in
    fp32, in checkpoints too. Parameters that froze are averaged on. It runs on the
    events of :class:`.BEMA`.

    Args:
        update_freq (str, optional): phi, the time from one snapshot to the next, counted from ``update_after``. Any of
            Composer's time units but seconds. Default: ``'1000ba'``.
        window (int): M, the snapshots that are averaged, at least 1. A resumed run has to keep it. Default: ``10``.
        replace_training_weights (bool): Whether training goes on from the average after each update. The optimizer
            keeps its state, such as the momentum of the weights that were replaced. Algorithms that come after this
            one see the average, those before it the weights that led to it. Default: ``False``, where the average is
            for evaluation and checkpoints only.
        snapshot_folder (str, optional): A folder on a disk, on each machine, to keep the snapshots in instead of
            memory. Its files lose their names as soon as they are written, and are gone when the run ends, however it
            does; a resumed run takes the snapshots from the checkpoint. Default: ``None``.
        device (str, optional): Where snapshots and average are kept; None is beside the parameters. Default: ``'cpu'``,
            host memory.

    The other arguments, and the errors, are those of :class:`.BEMA`.

    Example:
        .. testcode::

            from composer_bema import LAWA

            algorithm = LAWA(update_freq='1000ba', window=10)
    """

    def __init__(
        self,
        update_freq: Optional[Union[str, Time]] = None,
        window: int = DEFAULTS.lawa_window,
        update_after: Union[str, Time] = f'{DEFAULTS.update_after}ba',
        replace_training_weights: bool = False,
        snapshot_folder: Optional[str] = None,
        *,
        update_interval: Optional[Union[str, Time]] = None,
        eval_labels: Optional[Sequence[str]] = None,
        save_weights: Optional[SaveWeights] = None,
        state_in_checkpoint: bool = True,
        average_buffers: bool = True,
        nonfinite: NonFinite = 'raise',
        device: Optional[Union[torch.device, str]] = 'cpu',
    ) -> None:
        if not isinstance(replace_training_weights, bool):
            raise TypeError(f'replace_training_weights must be True or False, but is {replace_training_weights!r}.')
        self.replace_training_weights = replace_training_weights
        super().__init__(
            Window(window),
            settings={'window': window, 'replace_training_weights': replace_training_weights},
            update_freq=parse_update_freq(update_freq, update_interval, f'{DEFAULTS.lawa_update_freq}ba'),
            update_after=update_after,
            snapshot_folder=snapshot_folder,
            eval_labels=eval_labels,
            save_weights=save_weights,
            state_in_checkpoint=state_in_checkpoint,
            average_buffers=average_buffers,
            nonfinite=nonfinite,
            device=device,
        )

    def _follow_update(self, state: State) -> None:
        if self.replace_training_weights:
            self.average.copy_to(state.model)
