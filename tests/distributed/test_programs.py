# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What Composer does by itself in the runs of `programs`, so that a difference elsewhere is an average's doing."""

from pathlib import Path

import pytest
import torch

from tests.distributed.programs import TOPOLOGIES, train
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp1-hybrid'])
def test_several_ranks_train_as_one_does(name: str) -> None:
    (alone,) = run_ranks(train, 1, TOPOLOGIES['single'], batch_norm=False)
    together = run_ranks(train, TOPOLOGIES[name].world_size, TOPOLOGIES[name], batch_norm=False)
    for seen in together:
        torch.testing.assert_close(seen['batch_end', 8], alone['batch_end', 8], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    'name', ['single', 'ddp', 'fsdp1', 'fsdp1-full', 'fsdp1-full-rank0-only', 'fsdp2-full-rank0-only']
)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    topology = TOPOLOGIES[name]
    whole = run_ranks(
        train, topology.world_size, topology, batch_norm=False, save_folder=str(tmp_path), save_interval='4ba'
    )
    resumed = run_ranks(
        train, topology.world_size, topology, batch_norm=False, load_path=topology.checkpoint(tmp_path, 4)
    )
    for one, other in zip(whole, resumed, strict=True):
        assert next(iter(other)) == ('fit_start', 4)
        torch.testing.assert_close(other['fit_start', 4], one['batch_end', 4], rtol=0, atol=0)
        torch.testing.assert_close(other['batch_end', 8], one['batch_end', 8], rtol=0, atol=0)
