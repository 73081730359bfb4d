# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What all tests share: a quiet, offline, repeatable process, the golden numbers, and tiny models made on the spot.

torch, Composer and transformers are imported where they are used, so that a test of pure scalars starts at once.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Read by the libraries when they are imported, so set before anything imports them; subprocesses inherit it.
os.environ.update(
    {
        'HF_HUB_OFFLINE': '1',
        'HF_DATASETS_OFFLINE': '1',
        'TRANSFORMERS_OFFLINE': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'TOKENIZERS_PARALLELISM': 'false',
        'MPLBACKEND': 'agg',
    }
)
# Threads that spin while they wait make a busy machine ten times slower.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

GOLDEN = Path(__file__).parent / 'golden'

# No deadline, for the machines of others are busy; the same examples in every run, so that a failure is somebody's own.
hypothesis.settings.register_profile('composer_bema', deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile('composer_bema')


class Golden(NamedTuple):
    """The numbers that one published implementation computed, and how they were made; see `golden/README.md`."""

    arrays: dict[str, np.ndarray]
    """Every array of `golden/<name>.npz`; its key begins with the id of the configuration that made it."""
    configs: dict[str, dict[str, Any]]
    """Configurations by id: the class, all its arguments, and how it was driven. Empty for `trajectory`."""

    def of(self, id: str) -> dict[str, np.ndarray]:
        """The arrays of one configuration, without the id in their keys."""
        return {key.removeprefix(f'{id}/'): value for key, value in self.arrays.items() if key.startswith(f'{id}/')}


@cache
def load_golden(name: str) -> Golden:
    """Reads `golden/<name>.npz` and the entry of `golden/index.json` that explains it."""
    with np.load(GOLDEN / f'{name}.npz', allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    for array in arrays.values():
        # The arrays are shared by all tests of the session.
        array.setflags(write=False)
    peers = json.loads((GOLDEN / 'index.json').read_text())['peers']
    return Golden(arrays, {config['id']: config for config in peers.get(name, {'configs': []})['configs']})


@pytest.fixture(scope='session')
def golden() -> Callable[[str], Golden]:
    """`golden('trl')` is what is in `golden/trl.npz`, with its configurations; `golden('trajectory')` the weights."""
    return load_golden


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if 'torch' in sys.modules:
        sys.modules['torch'].manual_seed(0)


@pytest.fixture
def make_mlp() -> 'Callable[..., torch.nn.Module]':
    """Makes a model with all that an average has to tell apart: weights, a frozen weight, float and integer buffers."""

    def make(seed: int = 0, dtype: 'torch.dtype | None' = None) -> 'torch.nn.Module':
        import torch

        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.ReLU(),
            torch.nn.Linear(8, 8),
            torch.nn.Linear(8, 3),
        )
        model[3].requires_grad_(False)
        return model.to(dtype)

    return make


@pytest.fixture
def make_causal_lm() -> 'Callable[..., LlamaForCausalLM]':
    """Makes a transformer of a few thousand parameters; `tie_word_embeddings` gives it a tied one."""

    def make(seed: int = 0, **config: Any) -> 'LlamaForCausalLM':
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        tiny = {
            'vocab_size': 64,
            'hidden_size': 16,
            'intermediate_size': 32,
            'num_hidden_layers': 2,
            'num_attention_heads': 2,
            'max_position_embeddings': 64,
        }
        return LlamaForCausalLM(LlamaConfig(**{**tiny, **config}))

    return make


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, gone after the test."""
    from torch import distributed as dist

    from composer_bema.offline.ranks import leave_process_group

    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    yield
    leave_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker('gpu')]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
