# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Models from whole configurations, from folders, and with overrides."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin, dynamic_module_utils

from composer_bema.formats.foreign_code import ForeignCodeError
from composer_bema.training.config import ConfigError
from composer_bema.training.models import build_hf_causal_lm
from composer_bema.training.tokenizers import build_tokenizer
from tests.formats.foreign import with_generation
from tests.training.tiny import TINY_MODEL

TOKENIZER = build_tokenizer({'name': 'bytes'})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model saved in bfloat16."""
    path = tmp_path_factory.mktemp('model')
    build_hf_causal_lm(TOKENIZER, config=TINY_MODEL['config']).model.bfloat16().save_pretrained(path)
    return str(path)


def test_a_whole_configuration_needs_no_vocabulary_size():
    model = build_hf_causal_lm(TOKENIZER, config=TINY_MODEL['config'])
    assert model.config.vocab_size == 259
    assert model.config.hidden_size == 16


def test_pretrained_weights_are_loaded_in_float32(folder):
    model = build_hf_causal_lm(TOKENIZER, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    again = build_hf_causal_lm(TOKENIZER, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_nothing_is_loaded_that_the_configuration_of_a_folder_names(folder, tmp_path):
    config = json.loads((Path(folder) / 'config.json').read_text())
    named = {**config, '_attn_implementation': 'someone/kernels:attention'}
    (tmp_path / 'config.json').write_text(json.dumps(named))
    with pytest.raises(ValueError, match=f"The configuration in '{tmp_path}' has code loaded"):
        build_hf_causal_lm(TOKENIZER, str(tmp_path), pretrained=False)


def test_no_other_model_is_loaded_that_the_configuration_of_a_folder_names(folder, tmp_path):
    config = json.loads((Path(folder) / 'config.json').read_text())
    named = {**config, 'text_config': {'model_type': 'mask2former', 'backbone': 'someone/model'}}
    (tmp_path / 'config.json').write_text(json.dumps(named))
    with pytest.raises(ValueError, match=f"The configuration in '{tmp_path}' has another model loaded"):
        build_hf_causal_lm(TOKENIZER, str(tmp_path), pretrained=False)


@pytest.mark.skipif(not hasattr(GenerationMixin, 'load_custom_generate'), reason='this version has none')
def test_generation_of_its_own_runs_where_it_is_trusted_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
    monkeypatch.setattr(sys, 'path', [*sys.path])
    copied, mark = shutil.copytree(folder, tmp_path / 'model'), tmp_path / 'has-run'
    with_generation(copied, mark)
    with pytest.raises(ForeignCodeError, match=f"'{copied}' has code of its own loaded"):
        build_hf_causal_lm(TOKENIZER, str(copied))
    assert not mark.exists()
    build_hf_causal_lm(TOKENIZER, str(copied), trust_remote_code=True)
    assert mark.exists()


def test_an_adapter_beside_a_model_is_refused(folder, tmp_path):
    """Transformers would make it, and PEFT import what its configuration names."""
    copied = shutil.copytree(folder, tmp_path / 'model')
    (copied / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match='holds an adapter beside the model: merge it into its base'):
        build_hf_causal_lm(TOKENIZER, str(copied))


def test_not_pretrained_takes_the_configuration_alone(folder):
    loaded = build_hf_causal_lm(TOKENIZER, folder)
    fresh = build_hf_causal_lm(TOKENIZER, folder, pretrained=False)
    assert fresh.config.hidden_size == 16
    assert not torch.equal(loaded.model.lm_head.weight, fresh.model.lm_head.weight)


def test_overrides(folder):
    model = build_hf_causal_lm(TOKENIZER, folder, pretrained=False, config_overrides={'num_hidden_layers': 2})
    assert len(model.model.model.layers) == 2


def test_blocks_are_the_units_of_sharding():
    model = build_hf_causal_lm(TOKENIZER, config=TINY_MODEL['config']).model
    assert [name for name, module in model.named_modules() if model.fsdp_wrap_fn(module)] == ['model.layers.0']


def test_lora_trains_the_adapters_alone():
    model = build_hf_causal_lm(TOKENIZER, config=TINY_MODEL['config'], peft_config={'peft_type': 'LORA', 'r': 2})
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all('lora' in name for name in trainable)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'model needs either'),
        ({'pretrained_model_name_or_path': 'x', 'config': {}}, 'model needs either'),
        ({'config': {'hidden_size': 3}}, r'model\.config\.model_type is missing'),
        ({'config': {'model_type': 'lama'}}, "model.config.model_type: transformers knows no 'lama'"),
        ({'config': {'model_type': 'llama', 'hiden_size': 3}}, r"model\.config\.hiden_size .* 'hidden_size'"),
        ({'pretrained_model_name_or_path': '/no/where'}, "'/no/where' is no folder here"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_hf_causal_lm(TOKENIZER, **arguments)


def test_a_wrong_override_is_named(folder):
    with pytest.raises(ConfigError, match=r"model\.config_overrides\.hiden_size .* 'hidden_size'"):
        build_hf_causal_lm(TOKENIZER, folder, config_overrides={'hiden_size': 3})
