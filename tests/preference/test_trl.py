# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The plain DPO of `reference.py`, and ours, are that of TRL's trainer with its BEMA callback: losses and weights."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from composer_bema.preference import DPO
from tests.preference.peers import NO_TRL, run_trl, smoothed_sigmoid, trl_python
from tests.preference.reference import Pair, train_dpo
from tests.preference.runs import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(trl_python() is None, reason=NO_TRL)]

VOCABULARY = 64
TOLERANCE = 1e-5
STEPS = 8
BATCH_SIZE = 4
BEMA = {
    'update_freq': 1,
    'ema_power': 0.5,
    'bias_power': 0.2,
    'lag': 10,
    'multiplier': 1.0,
    'min_ema_multiplier': 0.0,
    'update_after': 0,
    'ref_model_update_freq': 3,
    'ref_model_update_after': 0,
}
# Both start late, and the reference's first time, step 2, comes before there is a BEMA.
LATE = {**BEMA, 'min_ema_multiplier': 0.29, 'update_freq': 2, 'update_after': 2, 'ref_model_update_after': 2}
# Each loss in the settings of `train_dpo`, and in those of TRL.
LOSSES = {
    'sigmoid': ({'loss_type': 'sigmoid', 'label_smoothing': 0.0}, {'loss_type': 'sigmoid', 'label_smoothing': 0.0}),
    'smoothed': ({'loss_type': 'sigmoid', 'label_smoothing': 0.1}, smoothed_sigmoid(0.1)),
    'ipo': ({'loss_type': 'ipo', 'label_smoothing': 0.0}, {'loss_type': 'ipo', 'label_smoothing': 0.0}),
}
FAMILIES = {'llama': (LlamaConfig, LlamaForCausalLM), 'qwen2': (Qwen2Config, Qwen2ForCausalLM)}


def make_model(family: str, **config: Any) -> PreTrainedModel:
    config_class, model_class = FAMILIES[family]
    tiny = {
        'vocab_size': VOCABULARY,
        'hidden_size': 32,
        'intermediate_size': 64,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'max_position_embeddings': 64,
        # As initialized, a tiny model says the same whatever it is told.
        'initializer_range': 0.2,
    }
    torch.manual_seed(0)
    return model_class(config_class(**{**tiny, **config}))


def make_pairs(count: int) -> list[Pair]:
    """Pairs of different lengths, none of whose tokens is the padding's."""
    draw = random.Random(0)

    def tokens(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(shortest, longest))]

    return [
        {'prompt_ids': tokens(2, 8), 'chosen_ids': tokens(1, 12), 'rejected_ids': tokens(1, 12)} for _ in range(count)
    ]


def write_inputs(folder: Path, model: PreTrainedModel, pairs: list[Pair]) -> dict[str, str]:
    """What both trainers are given, in the files that TRL's process reads."""
    model.save_pretrained(folder / 'model')
    (folder / 'pairs.jsonl').write_text(''.join(f'{json.dumps(pair)}\n' for pair in pairs))
    return {'model': str(folder / 'model'), 'pairs': str(folder / 'pairs.jsonl')}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f'{name}: {text}'
        )


def run_both(
    folder: Path, family: str, plain: dict[str, Any], in_trl: dict[str, Any], bema: dict[str, Any] | None
) -> None:
    """Trains from the formulas and with TRL, each with its own settings of the loss, and compares."""
    model, pairs = make_model(family), make_pairs(STEPS * BATCH_SIZE)
    common = {'batch_size': BATCH_SIZE, 'steps': STEPS, 'learning_rate': 1e-3, 'beta': 0.3, 'bema': bema}
    losses, reference, policy = train_dpo(model, pairs, **plain, **common)
    trl_losses, trl_reference = run_trl(folder, {**write_inputs(folder, model, pairs), **common, **in_trl})
    assert trl_losses == pytest.approx(losses, rel=0, abs=TOLERANCE)
    assert_same(reference, trl_reference)
    assert_same(policy.state_dict(), load_file(folder / 'policy.safetensors'))
    # Had nothing moved, all would agree.
    moved = max((trl_reference[name] - value).abs().max().item() for name, value in model.state_dict().items())
    assert moved > 100 * TOLERANCE if bema else moved == 0


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('loss', LOSSES)
def test_the_plain_run_is_that_of_trl(tmp_path: Path, family: str, loss: str):
    run_both(tmp_path, family, *LOSSES[loss], BEMA)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('loss', LOSSES)
def test_a_run_of_composers_trainer_is_that_of_trl(tmp_path: Path, family: str, loss: str):
    plain, in_trl = LOSSES[loss]
    model, pairs = make_model(family), make_pairs(STEPS * BATCH_SIZE)
    common = {'batch_size': BATCH_SIZE, 'steps': STEPS, 'learning_rate': 1e-3, 'beta': 0.3, 'bema': BEMA}
    losses, reference = run_trl(tmp_path, {**write_inputs(tmp_path, model, pairs), **common, **in_trl})
    ours = train(
        STEPS,
        model=DPO(model, beta=0.3, **plain),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0),
        bema={'update_freq': '1ba', 'update_ref_model': True, 'ref_model_update_freq': '3ba'},
        pairs=pairs,
    )
    assert ours['losses'] == pytest.approx(losses, rel=0, abs=TOLERANCE)
    assert_same({n.removeprefix('reference_model.'): t for n, t in ours['reference'].items()}, reference)


@pytest.mark.parametrize('bema', [LATE, None], ids=['late', 'fixed'])
def test_the_reference_begins_to_follow_when_that_of_trl_does(tmp_path: Path, bema: dict[str, Any] | None):
    run_both(tmp_path, 'llama', *LOSSES['sigmoid'], bema)


def test_trls_sigmoid_takes_no_note_of_label_smoothing(tmp_path: Path):
    """Why `smoothed_sigmoid` is there: once this fails, TRL has the loss under its own name, and that can go."""
    run_both(
        tmp_path,
        'llama',
        {'loss_type': 'sigmoid', 'label_smoothing': 0.0},
        {'loss_type': 'sigmoid', 'label_smoothing': 0.1},
        BEMA,
    )
