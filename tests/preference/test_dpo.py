# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The DPO model: against a plain re-derivation, in a Trainer, with its metrics, resumed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer

from composer_bema import BEMA
from composer_bema.preference import DPO
from tests.distributed.programs import TOPOLOGIES, make_model
from tests.preference.reference import train_dpo
from tests.preference.runs import (
    GLOBAL_BATCH,
    collate,
    make_loader,
    make_pairs,
    make_policy,
    save_tuned,
    train,
    with_adapter,
)

# The settings of runs.BEMA_SETTINGS in steps.
PLAIN_BEMA = {
    'update_freq': 1,
    'update_after': 0,
    'ema_power': 0.5,
    'bias_power': 0.2,
    'lag': 10,
    'multiplier': 1.0,
    'min_ema_multiplier': 0.0,
    'ref_model_update_freq': 3,
    'ref_model_update_after': 2,
}
STEPS = 8
LEARNING_RATE = 5e-4


@pytest.mark.parametrize('model_type', ['llama', 'qwen2'])
@pytest.mark.parametrize('loss', [{'label_smoothing': 0.1}, {'loss_type': 'ipo', 'beta': 0.5}], ids=['sigmoid', 'ipo'])
def test_losses_and_reference_are_those_of_a_plain_loop(model_type: str, loss: dict[str, Any]):
    settings = {'beta': 0.1, 'loss_type': 'sigmoid', 'label_smoothing': 0.0, **loss}
    model = DPO(make_policy(model_type), **loss)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    found = train(STEPS, model=model, optimizer=optimizer)
    pairs = make_pairs() * 2
    expected = train_dpo(
        make_policy(model_type), pairs, GLOBAL_BATCH, STEPS, LEARNING_RATE, bema=PLAIN_BEMA, **settings
    )
    losses, reference = expected[:2]
    assert found['losses'] == pytest.approx(losses, abs=1e-5)
    assert found['num_ref_model_updates'] == 3
    assert len(found['reference']) == len(reference)
    for name, value in reference.items():
        torch.testing.assert_close(found['reference'][f'reference_model.{name}'], value, rtol=0, atol=1e-5)


def test_a_following_reference_differs_from_a_fixed_one():
    fixed = train(STEPS, bema={'update_freq': '1ba'})
    following = train(STEPS)
    assert fixed['num_ref_model_updates'] == 0
    start = DPO(make_policy()).state_dict()
    assert all(torch.equal(t, start[n]) for n, t in fixed['reference'].items())
    assert following['losses'][:2] == fixed['losses'][:2], 'the reference moves after the second step'
    assert following['losses'][2] != fixed['losses'][2]


@pytest.mark.parametrize('adapter', [False, True], ids=['whole', 'adapter'])
def test_the_reference_becomes_the_average_when_due(adapter: bool):
    if adapter:
        pytest.importorskip('peft')
    run = train(STEPS, adapter=adapter)
    start = DPO(with_adapter(make_policy()) if adapter else make_policy()).state_dict()
    assert run['reference'] and run['num_ref_model_updates'] == 3
    for n, reference in run['reference'].items():
        policy = n.replace('.reference.', '.default.').replace('reference_model.', 'model.')
        assert torch.equal(reference, run['average'][policy]), 'the last step is one of those'
    policy = 'lora_B.default' if adapter else 'model.lm_head'
    assert any(policy in n and not torch.equal(t, run['average'][n]) for n, t in run['weights'].items())
    for n, weights in run['weights'].items():
        if adapter and 'lora_' not in n:
            assert torch.equal(weights, start[n]), 'the base never changes'


def test_evaluation_puts_the_average_into_the_policy_alone():
    run = train(2, evaluate=True)
    # Before the evaluation and during its batches, after the step at which the reference was updated.
    before, *during = run['references_seen']
    assert during
    for seen in during:
        assert all(torch.equal(seen[n], before[n]) for n in before)
    # After step two the policy under evaluation is the average that the reference has become.
    assert run['metrics']['RewardMargin'] == 0
    assert run['metrics']['ReferenceKL'] == 0
    assert run['train_metrics']['ReferenceKL'] > 0


def test_metrics():
    model = DPO(make_policy(), beta=0.5)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.5)
    batch = collate(make_pairs(3))
    outputs = model(batch)
    metrics = model.get_metrics()
    for metric in metrics.values():
        model.update_metric(batch, outputs, metric)
    found = {name: float(metric.compute()) for name, metric in metrics.items()}

    divergences, log_probs, ratios = [], torch.zeros(3, 2), torch.zeros(3, 2)
    for i in range(3):
        for side in range(2):
            tokens = batch['input_ids'][i, side][batch['attention_mask'][i, side].bool()][None]
            policy, reference = (
                m(tokens).logits[0].log_softmax(-1).detach() for m in (model.model, model.reference_model)
            )
            for t in torch.nonzero(batch['labels'][i, side] >= 0).flatten().tolist():
                log_probs[i, side] += policy[t - 1, tokens[0, t]]
                ratios[i, side] += policy[t - 1, tokens[0, t]] - reference[t - 1, tokens[0, t]]
                divergences.append(float((policy[t - 1].exp() * (policy[t - 1] - reference[t - 1])).sum()))
    margins = 0.5 * (ratios[:, 0] - ratios[:, 1])
    expected = {
        'PreferenceLoss': -margins.sigmoid().log().mean(),
        'RewardAccuracy': (margins > 0).float().mean(),
        'RewardMargin': margins.mean(),
        'RewardChosen': 0.5 * ratios[:, 0].mean(),
        'RewardRejected': 0.5 * ratios[:, 1].mean(),
        'LogProbChosen': log_probs[:, 0].mean(),
        'LogProbRejected': log_probs[:, 1].mean(),
        'ReferenceKL': sum(divergences) / len(divergences),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


def test_microbatches_weigh_pairs_alike():
    def losses(microbatch: int) -> list[float]:
        trained = []
        for size in (4, microbatch):
            model = DPO(make_policy())
            trainer = Trainer(
                model=model,
                train_dataloader=make_loader(make_pairs()),
                optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
                max_duration='4ba',
                device='cpu',
                device_train_microbatch_size=size,
                accumulate_train_batch_on_tokens=True,
                progress_bar=False,
            )
            trainer.fit()
            trainer.close()
            trained.append(torch.cat([p.detach().flatten() for p in model.model.parameters()]))
        return (trained[0] - trained[1]).abs().tolist()

    assert max(losses(1)) < 1e-6


@pytest.mark.parametrize('adapter', [False, True], ids=['whole', 'adapter'])
def test_a_resumed_run_is_bit_exact(adapter: bool, tmp_path: Path):
    if adapter:
        pytest.importorskip('peft')
    whole = train(STEPS, adapter=adapter, evaluate=True, save_folder=tmp_path, save_step=4)
    path = TOPOLOGIES['single'].checkpoint(tmp_path, 4)
    resumed = train(STEPS, adapter=adapter, evaluate=True, load_path=path)
    at_save = train(4, adapter=adapter)
    for n, value in resumed['loaded_reference'].items():
        assert torch.equal(value, at_save['reference'][n])
    assert resumed['losses'] == whole['losses'][4:]
    assert resumed['num_ref_model_updates'] == whole['num_ref_model_updates'] == 3
    assert whole['reference'].keys() == resumed['reference'].keys()
    for kind in ('reference', 'weights', 'average'):
        assert all(torch.equal(value, resumed[kind][n]) for n, value in whole[kind].items())
    # And a control that must differ: the reference of another moment.
    changed = r"update_ref_model=None \(saved: True\), ref_model_update_freq=None \(saved: '3ba'\)"
    with pytest.warns(UserWarning, match=changed):
        other = train(STEPS, adapter=adapter, load_path=path, bema={'update_freq': '1ba'})
    assert other['losses'] != resumed['losses']


def test_a_reference_that_follows_from_a_resumption_on_is_counted_from_there(tmp_path: Path):
    train(4, bema={'update_freq': '1ba'}, save_folder=tmp_path, save_step=4)
    path = TOPOLOGIES['single'].checkpoint(tmp_path, 4)
    with pytest.warns(UserWarning, match=r'update_ref_model=True \(saved: None\)'):
        resumed, seventh = (train(steps, load_path=path) for steps in (STEPS, 7))
    assert resumed['num_ref_model_updates'] == 1
    for n, reference in resumed['reference'].items():
        assert torch.equal(reference, seventh['average'][n.replace('reference_model.', 'model.')])


def test_a_batch_of_single_sequences_is_refused():
    batch = {name: tensor[:, 0] for name, tensor in collate(make_pairs(3)).items()}
    with pytest.raises(ValueError, match=r'\(pairs, 2, tokens\), but this one has \(3, \d+\)'):
        DPO(make_policy())(batch)


def test_weights_without_a_reference_start_one():
    model, other = DPO(make_policy()), make_policy(seed=11)
    model.load_state_dict({f'model.{n}': t for n, t in other.state_dict().items()})
    for n, t in other.state_dict().items():
        assert torch.equal(model.state_dict()[f'reference_model.{n}'], t)


def test_an_adapter_does_not_start_from_weights_without_a_reference(tmp_path: Path):
    pytest.importorskip('peft')
    with pytest.raises(ValueError, match=r'^The weights to load are of a run without a reference.*build the model'):
        train(1, adapter=True, load_path=save_tuned(tmp_path, sharded=False), load_weights_only=True)


def test_without_a_reference_to_update_fit_refuses():
    trainer = Trainer(
        model=make_model(), max_duration='2ba', algorithms=[BEMA('1ba', update_ref_model=True)], device='cpu'
    )
    with pytest.raises(ValueError, match='needs a model with a reference, such as DPO'):
        trainer.fit(train_dataloader=make_loader(make_pairs()))


def test_a_reference_that_will_not_follow_is_warned_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        train(2, bema={'update_freq': '1ba', 'update_ref_model': True})
    assert any(
        'The reference model will not follow: its first update is due after 400' in str(w.message) for w in caught
    )


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'beta': 0}, 'beta must be above 0, but is 0'),
        ({'beta': float('nan')}, 'beta must be at least 0 and finite, but is nan'),
        ({'loss_type': 'hinge'}, "loss_type must be 'sigmoid' or 'ipo'"),
        ({'label_smoothing': 0.5}, r'label_smoothing must be in \[0, 0.5\)'),
        ({'label_smoothing': -0.1}, 'label_smoothing must be at least 0'),
        ({'label_smoothing': 0.1, 'loss_type': 'ipo'}, 'no meaning for'),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DPO(make_policy(), **settings)


@pytest.mark.parametrize('setting', ['beta', 'label_smoothing'])
def test_settings_that_are_no_numbers_are_refused(setting: str):
    with pytest.raises(TypeError, match=f"{setting} must be a number, but is '0.1'"):
        DPO(make_policy(), **{setting: '0.1'})


def test_weights_that_the_policy_lacks_are_refused():
    model = DPO(make_policy())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = {n: torch.ones_like(t) for n, t in before.items() if n.startswith('model.')}
    with pytest.raises(ValueError, match="cannot take 'lm_head.weight': the policy trains no tensor of that name"):
        model.update_reference({**weights, 'lm_head.weight': weights['model.lm_head.weight']})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_tied_weights_reach_the_reference_under_both_names():
    policy = make_policy()
    policy.lm_head.weight = policy.model.embed_tokens.weight
    model = DPO(policy)
    model.update_reference({f'model.{n}': torch.full_like(t, 3.0) for n, t in policy.state_dict().items()})
    assert all(torch.equal(t, torch.full_like(t, 3.0)) for t in model.reference_model.state_dict().values())
