# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What leaves a DPO run: the policy, as if there had been no reference."""

import pytest
import torch
from composer import Trainer
from transformers import AutoModelForCausalLM

from composer_bema import BEMA, FlopsMonitor, HuggingFaceCheckpointer
from composer_bema.cli import main
from composer_bema.flops import architecture_of, training_flops
from composer_bema.preference import DPO
from composer_bema.training.tokenizers import build_byte_tokenizer
from tests.preference.runs import make_loader, make_pairs, make_policy, with_adapter


def fit(model: DPO, **settings) -> Trainer:
    trainer = Trainer(
        model=model,
        train_dataloader=make_loader(make_pairs()),
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        max_duration='3ba',
        algorithms=[BEMA(update_freq='1ba', update_ref_model=True, ref_model_update_freq='2ba')],
        device='cpu',
        progress_bar=False,
        **settings,
    )
    trainer.fit()
    trainer.close()
    return trainer


def test_a_hugging_face_folder_has_the_averaged_policy(tmp_path):
    policy = make_policy()
    trainer = fit(DPO(policy), callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'hf'))])
    state = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').state_dict()
    average = trainer.state.algorithms[0].averaged_state_dict()
    assert state.keys() == policy.state_dict().keys()
    assert all(torch.equal(tensor, average[f'model.{name}']) for name, tensor in state.items())


def test_the_adapter_in_a_hugging_face_folder_is_the_policys(tmp_path):
    peft = pytest.importorskip('peft')
    trainer = fit(DPO(with_adapter(make_policy())), callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'hf'))])
    state = peft.PeftModel.from_pretrained(make_policy(), tmp_path / 'hf').state_dict()
    average = trainer.state.algorithms[0].averaged_state_dict()
    assert not (tmp_path / 'hf' / 'reference').exists()
    assert not any('reference' in name for name in state)
    assert all(torch.equal(tensor, average[f'model.{name}']) for name, tensor in state.items() if 'lora_' in name)


@pytest.mark.parametrize('weights', ['average', 'training'])
def test_a_checkpoint_is_exported_without_its_reference(tmp_path, weights):
    torch.manual_seed(0)
    policy = make_policy(vocabulary=259)
    model = DPO(policy, build_byte_tokenizer())
    trainer = fit(model, save_folder=str(tmp_path / 'checkpoints'), save_interval='3ba')
    source = str(tmp_path / 'checkpoints' / 'ep0-ba3-rank0.pt')
    main(['export', source, '--weights', weights, '--out', str(tmp_path / 'hf')], standalone_mode=False)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').state_dict()
    expected = trainer.state.model.state_dict()
    if weights == 'average':
        expected = trainer.state.algorithms[0].averaged_state_dict()
    assert all(torch.equal(tensor, expected[f'model.{name}']) for name, tensor in state.items())


def test_flops_include_the_forward_pass_of_the_reference():
    policy = make_policy()
    monitor = FlopsMonitor(sequence_length=16)
    trainer = fit(DPO(policy), callbacks=[monitor])
    tokens = trainer.state.timestamp.token.value
    per_token = training_flops(architecture_of(policy.config), 16, tokens=1)
    assert tokens > 0
    assert monitor.flops_per_token == pytest.approx(per_token * 4 / 3, rel=1e-3)
