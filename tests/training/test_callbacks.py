# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The Hugging Face folder that a run writes, also of adapters and of a model that FSDP shards."""

import json

import pytest
import torch
from composer import Trainer
from transformers import AutoModelForCausalLM, GenerationConfig

from composer_bema.formats.manifest import read_manifest
from composer_bema.training.callbacks import HuggingFaceCheckpointer
from tests.distributed import programs
from tests.distributed.programs import Topology
from tests.distributed.ranks import run_ranks
from tests.formats.runs import make_loader, make_model, save_run


def fit(model, **kwargs):
    trainer = Trainer(
        model=model,
        optimizers=programs.make_optimizer(model, 'sgd'),
        train_dataloader=make_loader(),
        max_duration='2ba',
        progress_bar=False,
        device='cpu',
        **kwargs,
    )
    trainer.fit()
    trainer.close()


def test_adapters(tmp_path):
    peft = pytest.importorskip('peft')
    model = make_model(lora=True)
    fit(model, callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'hf'))])
    state = peft.PeftModel.from_pretrained(make_model().model, tmp_path / 'hf').state_dict()
    trained = model.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    assert not (tmp_path / 'hf' / 'model.safetensors').exists()
    assert read_manifest(tmp_path / 'hf')['weights'] == 'training'


def test_a_folder_for_every_interval_with_the_models_own_generation_settings(tmp_path):
    model = make_model()
    model.model.generation_config = GenerationConfig(do_sample=True, temperature=0.25)
    fit(model, callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'ba{batch}'), '1ba', 'bfloat16')])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ba1', 'ba2']
    for folder in tmp_path.iterdir():
        assert GenerationConfig.from_pretrained(folder).temperature == 0.25
        assert json.loads((folder / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
    assert model.model.generation_config.temperature == 0.25
    assert model.model.dtype == torch.float32


def save_run_and_folder(folder, topology):
    return save_run(folder, topology, callbacks=[lambda: HuggingFaceCheckpointer(f'{folder}/hf')])


@pytest.mark.slow
@pytest.mark.parametrize('wrapper', ['fsdp1', 'fsdp2'])
def test_sharded_models(tmp_path, wrapper):
    weights, _ = run_ranks(save_run_and_folder, 2, str(tmp_path), Topology(2, wrapper))
    state = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').state_dict()
    assert {f'model.{name}' for name in state} == set(weights['BEMA'])
    for name, tensor in state.items():
        assert torch.equal(tensor, weights['BEMA'][f'model.{name}']), name
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['architectures'] == ['LlamaForCausalLM']
    manifest = read_manifest(tmp_path / 'hf')
    assert manifest is not None
    assert (manifest['weights'], manifest['step']) == ('BEMA', 4)


def test_writing_leaves_the_run_as_it_is(tmp_path):
    """No random number is drawn and no setting changed, so that a run with the callback is the run without it."""
    models = [make_model(), make_model()]
    configs = [model.config.to_dict() for model in models]
    fit(models[0], seed=1)
    after = torch.get_rng_state()
    fit(models[1], seed=1, callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'hf'), '1ba')])
    assert torch.equal(torch.get_rng_state(), after)
    assert [model.config.to_dict() for model in models] == configs
