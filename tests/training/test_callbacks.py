# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The Hugging Face folder that a run writes, also of adapters and of a model that FSDP shards; FLOPs in the metrics."""

import json

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from composer_bema.flops import Architecture, training_flops
from composer_bema.formats.manifest import read_manifest
from composer_bema.training.callbacks import FlopsMonitor, HuggingFaceCheckpointer
from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.outputs import evaluation_curves, read_metrics
from composer_bema.training.run import train
from tests.algorithms.runs import make_classifier, make_trainer
from tests.distributed import programs
from tests.distributed.programs import Topology
from tests.distributed.ranks import run_ranks
from tests.formats.runs import TINY, make_loader, make_model, save_run
from tests.training.tiny import tiny_settings, write_yaml


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


def test_a_model_that_is_not_of_transformers_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(ValueError, match='a ComposerClassifier is no HuggingFaceModel: wrap'):
        make_trainer(callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'hf'))])


def flops_of(rows):
    """The FLOPs by step; each step's rows say the same."""
    logged = {(row['batch'], row['flops/total']) for row in rows if 'flops/total' in row}
    assert len(dict(logged)) == len(logged)
    return dict(logged)


def test_flops_are_logged_before_each_evaluation_and_alike_when_resumed(tmp_path):
    settings = tiny_settings(tmp_path) | {
        'callbacks': {'flops_monitor': {'sequence_length': 32}},
        'save_folder': f'{tmp_path}/checkpoints',
        'save_interval': '2ba',
    }
    path = write_yaml(tmp_path, settings)
    train(load_config(path, ['eval_first=true']))
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    model = Architecture(16, 32, 1, 2, 259)
    # Steps of four rows of 32 tokens.
    expected = {step: float(training_flops(model, 32, tokens=step * 4 * 32)) for step in range(7)}
    assert flops_of(rows) == expected
    evaluated = [i for i, row in enumerate(rows) if 'metrics/one/LanguageCrossEntropy' in row]
    assert [rows[i]['batch'] for i in evaluated] == [0, 3, 6]
    assert all(rows[i]['batch'] in flops_of(rows[:i]) for i in evaluated)

    checkpoint = f'load_path={tmp_path}/checkpoints/ep0-ba4-rank0.pt'
    train(load_config(path, [checkpoint, f'run_folder={tmp_path}/again', f'save_folder={tmp_path}/checkpoints_again']))
    resumed = read_metrics(tmp_path / 'again' / 'metrics.jsonl')
    assert flops_of(resumed) == {step: expected[step] for step in (5, 6)}
    over_flops = [(expected[step], loss) for step, loss in evaluation_curves(rows)['one']]
    assert [x for x, _ in over_flops] == [expected[0], expected[3], expected[6]]


@pytest.mark.parametrize('lora', [False, True])
def test_the_model_or_numbers_tell_what_a_token_costs(lora):
    if lora:
        pytest.importorskip('peft')
    sizes = {name: size for name, size in TINY.items() if name != 'max_position_embeddings'}
    logger = InMemoryLogger()
    wide = {**sizes, 'hidden_size': 16}
    fit(make_model(lora=lora), callbacks=[FlopsMonitor(12)], loggers=logger)
    assert [value for _, value in logger.data['flops/total']] == [
        float(training_flops(Architecture(**sizes), 12, tokens)) for tokens in (96, 192)
    ]
    for architecture in (wide, Architecture(**wide)):
        logger = InMemoryLogger()
        fit(make_model(), callbacks=[FlopsMonitor(12, architecture)], loggers=logger)
        assert logger.data['flops/total'][-1][1] == training_flops(Architecture(**wide), 12, 192)


def test_flops_that_cannot_be_told(monkeypatch):
    with pytest.raises(ConfigError, match='architecture.hiden_size is not a setting; the nearest one is'):
        FlopsMonitor(12, {'hiden_size': 8})
    with pytest.raises(ConfigError, match='architecture.intermediate_size is missing'):
        FlopsMonitor(12, {'hidden_size': 8})
    with pytest.raises(ValueError, match='in a ComposerClassifier, which is no HuggingFaceModel: give it an architect'):
        make_trainer(callbacks=[FlopsMonitor(12)])
    with pytest.raises(ValueError, match='sequence_length must be a positive whole number of tokens, not 0'):
        make_trainer(callbacks=[FlopsMonitor(0, Architecture(8, 5, 2, 2, 7))])
    monkeypatch.setattr(LlamaConfig, 'model_type', 'camel')
    with pytest.raises(ValueError, match="The model_type 'camel' is none whose FLOPs can be told"):
        fit(make_model(), callbacks=[FlopsMonitor(12)])


def test_data_that_count_no_tokens():
    data = DataLoader(TensorDataset(torch.ones(8, 8), torch.zeros(8, dtype=torch.long)), batch_size=4)
    callbacks = [FlopsMonitor(12, Architecture(8, 5, 2, 2, 7))]
    trainer = make_trainer(model=make_classifier(), train_dataloader=data, max_duration='1ba', callbacks=callbacks)
    with pytest.raises(ValueError, match='the data of this run counts none: give the dataloader a DataSpec'):
        trainer.fit()
    trainer.close()
