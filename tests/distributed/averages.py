# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the ranks of a run see of its averages."""

from __future__ import annotations

import copy
from typing import Any

from composer import State

from composer_bema.algorithms.weight_averaging import averages_among
from composer_bema.formats.entries import pack_entry, unpack_entry
from tests.distributed.programs import full_state, full_weights


def whole_averages(state: State) -> dict[str, dict[str, Any]]:
    """Copies of all that a checkpoint would keep of the averages, by their classes' names.

    Of a sharded model rank 0 alone gets the tensors, whole.
    """
    return {
        type(average).__name__: copy.deepcopy(unpack_entry(pack_entry(average.saved_state(), as_shards=False)))
        for average in averages_among(state.algorithms)
    }


def averages_and_weights(state: State) -> dict[str, Any]:
    return {'averages': whole_averages(state), 'weights': full_weights(state)}


def everything(state: State) -> dict[str, Any]:
    """All that a resumed run has to go on from."""
    return {'averages': whole_averages(state), **full_state(state)}
