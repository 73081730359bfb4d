# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The reference of a policy with an adapter: a second adapter that nothing trains, on a base that never changes."""

import pytest
import torch

from composer_bema.averaging.parameters import named_persistent_buffers, names_kept_out
from composer_bema.averaging.rules import bema_rule
from composer_bema.averaging.state import AverageState
from composer_bema.preference import DPO
from composer_bema.preference.references import frozen_copy, reference_adapter
from tests.preference.runs import collate, make_pairs, make_policy, with_adapter

pytest.importorskip('peft')


def test_the_copy_is_frozen_and_of_the_same_values():
    model = DPO(with_adapter(make_policy(), init_lora_weights=False))
    parameters = dict(model.named_parameters())
    references = {n: p for n, p in parameters.items() if '.reference.' in n}
    assert len(references) == 8
    for n, reference in references.items():
        policy = parameters[n.replace('.reference.', '.default.')]
        assert policy.requires_grad and not reference.requires_grad
        assert torch.equal(policy, reference) and policy.data_ptr() != reference.data_ptr()


def test_the_reference_sees_its_own_adapter_without_dropout_and_leaves_the_policy_as_it_was():
    model = DPO(with_adapter(make_policy(), lora_dropout=0.5, init_lora_weights=False))
    batch = collate(make_pairs(2))
    inputs = batch['input_ids'].flatten(0, 1)
    model.model.eval()
    before = model.model(inputs).logits
    model.train()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if '.default.' in n:
                p.add_(1.0)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with reference_adapter(model.model) as reference:
        assert torch.equal(reference(inputs).logits, before)
    assert all(module.training for module in model.model.modules())
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not torch.equal(model.model(inputs).logits, before)


def test_an_initialisation_from_the_base_leaves_the_policy_as_it_was():
    policy = with_adapter(make_policy(), init_lora_weights='olora')
    inputs = collate(make_pairs(2))['input_ids'].flatten(0, 1)
    before = policy(inputs).logits
    model = DPO(policy)
    assert torch.equal(policy(inputs).logits, before)
    with reference_adapter(model.model) as reference:
        assert torch.equal(reference(inputs).logits, before)


def test_an_error_in_the_reference_leaves_the_policy_active():
    model = DPO(with_adapter(make_policy()))
    with pytest.raises(RuntimeError, match='inside'), reference_adapter(model.model):
        raise RuntimeError('inside')
    assert {m._active_adapter[0] for m in model.modules() if hasattr(m, 'lora_A')} <= {'default', 'd'}
    assert model.model.training


def test_an_adapter_that_trains_its_base_is_refused():
    with pytest.raises(ValueError, match="With bias='all' the adapter trains biases that policy and reference share"):
        DPO(with_adapter(make_policy('qwen2'), bias='all'))
    policy = with_adapter(make_policy())
    policy.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head\.weight' is trained, but policy and reference share it"):
        DPO(policy)


def test_an_adapter_of_the_references_name_is_refused():
    policy = with_adapter(make_policy(), adapter_name='reference')
    with pytest.raises(ValueError, match="an adapter named 'reference'.*: give it another name"):
        DPO(policy)


def test_base_weights_are_refused_and_module_buffers_of_the_base_left_as_they_are():
    policy = with_adapter(make_policy())
    policy.base_model.model.register_buffer('statistic', torch.zeros(2))
    model = DPO(policy)
    model.update_reference({'model.base_model.model.statistic': torch.ones(2)})
    assert torch.equal(policy.base_model.model.statistic, torch.zeros(2))
    with pytest.raises(ValueError, match="cannot take 'model.base_model.model.lm_head.weight'"):
        model.update_reference({'model.base_model.model.lm_head.weight': torch.ones(31, 16)})


def test_other_modules_that_are_trained_have_a_copy_as_well():
    model = DPO(with_adapter(make_policy(), modules_to_save=['lm_head']))
    weights = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    assert any('lm_head' in n for n in weights)
    batch = collate(make_pairs(2))
    before = model(batch)
    model.update_reference(weights)
    assert torch.equal(model(batch)['log_prob_chosen'], before['log_prob_chosen'])
    assert not torch.equal(model(batch)['reward_chosen'], before['reward_chosen'])


def test_parts_that_are_cut_differently_are_refused():
    model = DPO(with_adapter(make_policy()))
    [name, *_] = [n for n, p in model.named_parameters() if p.requires_grad]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'other parts of .* FSDP1 cuts adapters that way, so use FSDP2'):
        model.update_reference({name: torch.ones(3)})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_new_adapter_weights_reach_the_reference_and_nothing_else():
    model = DPO(with_adapter(make_policy()))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    policy = {n: torch.full_like(t, 3.0) for n, t in before.items() if '.default.' in n}
    model.update_reference(policy)
    for n, t in model.state_dict().items():
        assert torch.equal(t, torch.full_like(t, 3.0) if '.reference.' in n else before[n]), n


def test_the_averages_of_a_model_leave_its_reference_out():
    policy = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model = torch.nn.ModuleDict({'policy': policy, 'reference': frozen_copy(policy)})
    kept_out = names_kept_out(model)
    assert kept_out == {n for n in named_persistent_buffers(model) if n.startswith('reference.')}
    average = AverageState(bema_rule())
    average.start(model)
    assert {n.split('.')[0] for n in average.average()} == {'policy'}
