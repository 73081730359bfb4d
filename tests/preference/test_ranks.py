# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""DPO on two ranks: the same run as on one, and bit-exact when it is resumed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.programs import TOPOLOGIES
from tests.distributed.ranks import run_ranks
from tests.preference.runs import make_policy, save_tuned, train

STEPS = 8


@cache
def on_one_rank(adapter: bool) -> dict[str, Any]:
    return train(STEPS, adapter=adapter)


@pytest.mark.parametrize(
    ('topology', 'adapter'),
    [
        ('ddp', False),
        ('ddp', True),
        ('fsdp2', False),
        ('fsdp2', True),
        ('fsdp2-full-rank0-only', False),
        ('fsdp2-full-rank0-only', True),
        ('fsdp1', False),
    ],
)
def test_two_ranks_do_what_one_does_also_when_resumed(topology: str, adapter: bool, tmp_path: Path):
    if adapter:
        pytest.importorskip('peft')
    whole, _ = run_ranks(
        train, 2, STEPS, topology=topology, adapter=adapter, evaluate=True, save_folder=tmp_path, save_step=4
    )
    path = TOPOLOGIES[topology].checkpoint(tmp_path, 4)
    resumed, _ = run_ranks(train, 2, STEPS, topology=topology, adapter=adapter, evaluate=True, load_path=path)

    expected = on_one_rank(adapter)
    assert whole['losses'] == pytest.approx(expected['losses'], abs=1e-5)
    assert whole['reference'].keys() == expected['reference'].keys()
    for n, value in expected['reference'].items():
        torch.testing.assert_close(whole['reference'][n], value, rtol=0, atol=1e-5)

    assert resumed['num_ref_model_updates'] == whole['num_ref_model_updates'] == 3
    assert resumed['losses'] == whole['losses'][4:]
    for kind in ('reference', 'weights'):
        assert all(torch.equal(value, resumed[kind][n]) for n, value in whole[kind].items())


@pytest.mark.parametrize('topology', ['ddp', 'fsdp1-full', 'fsdp2-full', 'fsdp2'])
def test_weights_without_a_reference_start_one(topology: str, tmp_path: Path):
    is_sharded = TOPOLOGIES[topology].is_sharded
    settings: dict[str, Any] = {'load_path': save_tuned(tmp_path, is_sharded), 'load_weights_only': True}
    if is_sharded:
        settings['load_ignore_keys'] = ['state/model/reference_model*']
    expected = make_policy(seed=11).state_dict()
    for rank in run_ranks(train, 2, 1, topology=topology, **settings):
        assert rank['loaded_reference'].keys() == {f'reference_model.{n}' for n in expected}
        assert all(torch.equal(rank['loaded_reference'][f'reference_model.{n}'], t) for n, t in expected.items())
