# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Which algorithms and parallelisms can share a run with an average."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from composer import Algorithm, State
from composer.algorithms import EMA as ComposerEMA

if TYPE_CHECKING:
    from composer_bema.algorithms.weight_averaging import WeightAveraging

__all__ = ['check_algorithms', 'check_parallelism']


def check_algorithms(averages: Sequence[WeightAveraging], algorithms: Sequence[Algorithm]) -> None:
    """Checks the averages of a run against each other and against its other algorithms.

    Raises:
        ValueError: If two of them have one class name, an evaluator or the checkpoints in common.
    """
    for average in averages:
        if any(isinstance(other, ComposerEMA) for other in algorithms):
            raise ValueError(
                f"Composer's own EMA and {type(average).__name__} cannot share a run, since both put an average into "
                'the model: use composer_bema.EMA, whose eval_labels keep them apart.',
            )
    for one, other in itertools.combinations(averages, 2):
        _check_pair(one, other)


def check_parallelism(averages: Sequence[WeightAveraging], state: State) -> None:
    """Checks that the parameters will be sharded in a way that the averages of a run can follow.

    Raises:
        ValueError: If they will not.
    """
    name = type(averages[0]).__name__
    if state.tp_config is not None:
        raise ValueError(f'{name} does not support tensor parallelism: leave tp out of the parallelism_config.')
    if state.fsdp_config is not None and not state.fsdp_config.use_orig_params:
        raise ValueError(f'{name} cannot average the fused parameters of FSDP: set use_orig_params to True.')


def _check_pair(one: WeightAveraging, other: WeightAveraging) -> None:
    names = f'{type(one).__name__} and {type(other).__name__}'
    if type(one).__qualname__ == type(other).__qualname__:
        raise ValueError(
            f'A run can have one {type(one).__name__} only, since Composer restores algorithms by their class name: '
            'compute further averages from checkpoints afterwards.',
        )
    if one.save_weights == other.save_weights == 'average':
        raise ValueError(f"{names} both have save_weights='average', but a checkpoint's model can hold one average.")
    if one.eval_labels is None or other.eval_labels is None:
        raise ValueError(
            f"{names} share a run: give each of them eval_labels of its own, such as eval_labels=['bema'], and the "
            'Trainer an Evaluator of that label.',
        )
    shared = set(one.eval_labels) & set(other.eval_labels)
    if shared:
        raise ValueError(f"{names} share the eval label '{min(shared)}', but an evaluator can see one average only.")
