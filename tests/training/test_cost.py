# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a YAML tells of a run's model and tokens."""

import pytest

from composer_bema.flops import forward_flops, parameter_count
from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.cost import architecture_of_run, sequence_length_of_run, tokens_of_run
from composer_bema.training.models import build_hf_causal_lm
from composer_bema.training.tokenizers import build_tokenizer
from tests.training.tiny import TINY_MODEL, tiny_settings, write_yaml


@pytest.fixture
def configured(tmp_path):
    path = write_yaml(tmp_path, tiny_settings(tmp_path))
    return lambda *overrides: load_config(path, overrides)


def test_the_architecture_is_that_of_the_model_that_is_built(tmp_path, configured):
    tokenizer = build_tokenizer({'name': 'bytes'})
    model = build_hf_causal_lm(tokenizer, config=TINY_MODEL['config']).model
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    architecture = architecture_of_run(configured())
    assert parameter_count(architecture) == matrices
    assert architecture.vocab_size == len(tokenizer)
    model.config.save_pretrained(tmp_path / 'model')
    section = f'{{name: hf_causal_lm, pretrained_model_name_or_path: {tmp_path}/model, use_train_metrics: false}}'
    assert architecture_of_run(configured(f'model={section}')) == architecture
    layers = 'model.config_overrides={num_hidden_layers: 3}'
    deep = architecture_of_run(configured(f'model={section}', layers))
    assert (deep.num_hidden_layers, forward_flops(deep, 8) > forward_flops(architecture, 8)) == (3, True)


def test_a_vocabulary_that_is_told_needs_no_tokenizer(configured):
    config = configured('model.config.vocab_size=300', 'tokenizer.name=/no/where')
    assert architecture_of_run(config).vocab_size == 300


@pytest.mark.parametrize(
    ('override', 'error', 'sentence'),
    [
        ('model.config.hiden_size=8', ConfigError, 'model.config.hiden_size is not a setting of LlamaConfig'),
        ('model.config.model_type=olmo', ValueError, "The model_type 'olmo' is none whose FLOPs can be told"),
        ('model.pretrained_model_name_or_path=x', ConfigError, 'not both'),
    ],
)
def test_models_that_cannot_be_counted(configured, override, error, sentence):
    with pytest.raises(error, match=sentence):
        architecture_of_run(configured(override))


@pytest.mark.parametrize(
    ('overrides', 'tokens'),
    [
        (['max_duration=6ba'], 6 * 4 * 32),
        (['max_duration=6ba', 'max_seq_len=16'], 6 * 4 * 16),
        (['max_duration=6ba', 'train_loader.dataset.max_seq_len=8'], 6 * 4 * 8),
        (['max_duration=10sp'], 10 * 32),
        (['max_duration=1000tok'], 1000),
        (['max_duration=1000tok', 'train_loader.name=finetuning'], 1000),
        (['max_duration=6ba', 'train_loader.name=finetuning'], None),
        (['max_duration=6ba', 'train_loader.name=preference'], None),
        (['max_duration=2ep'], None),
        (['max_duration=2'], None),
        (['max_duration=60sec'], None),
    ],
)
def test_tokens(configured, overrides, tokens):
    assert tokens_of_run(configured(*overrides)) == tokens


def test_the_length_of_a_row(configured):
    assert sequence_length_of_run(configured()) == 32
    assert sequence_length_of_run(configured('train_loader.dataset.max_seq_len=8')) == 8
