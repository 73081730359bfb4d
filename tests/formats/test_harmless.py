# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a file says of other files leads nowhere else, and what it says of code is refused."""

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from composer_bema.formats.harmless import (
    is_file_name,
    leads_below,
    names_model,
    refuse_named_code,
    refuse_named_model,
)

PATHS = st.lists(st.sampled_from(['a', 'b.c', '..', '.', '', '\\', '~', '\0']), max_size=5).map('/'.join)


@pytest.mark.parametrize('name', ['x', 'model-00001-of-00002.safetensors', '.metadata', '...', 'a b', 'é'])
def test_names_of_files(name):
    assert is_file_name(name)


@pytest.mark.parametrize('name', ['', '.', '..', '/', 'a/', '../x', 'a/x', '/etc/passwd', 'a\0b', None, 3, b'x'])
def test_what_is_no_name_of_a_file(name):
    assert not is_file_name(name)


@given(PATHS)
def test_what_leads_below_a_folder_is_found_below_it(path):
    folder = Path('/some/folder')
    if is_file_name(path):
        assert (folder / path).parent == folder
    if leads_below(path):
        # Without looking at the disk, where nothing of this is.
        assert not {'..'} & {*(folder / path).parts}
        assert (folder / path).is_relative_to(folder) and folder / path != folder


@pytest.mark.parametrize('path', ['x', 'a/x', './a', 'a/../x', '..', '../x', '/x', '', '.', 'a\0'])
def test_what_leads_below(path):
    assert leads_below(path) == (path in ('x', 'a/x', './a'))


@pytest.mark.parametrize(
    'config',
    [
        {'_attn_implementation': 'someone/kernels:attention'},
        {'attn_implementation': 'someone/kernels'},
        {'vision_config': {'_attn_implementation_internal': 'someone/kernels:attention'}},
        {'peft_type': 'PROMPT_TUNING', 'tokenizer_kwargs': {'trust_remote_code': True}},
        {'peft_type': 'LORA', 'megatron_config': {'x': 1}, 'megatron_core': 'os'},
        {'auto_mapping': {'base_model_class': 'X', 'parent_library': 'my.module'}},
        {'auto_mapping': {'base_model_class': 'X', 'parent_library': 'transformers_not'}},
        {'parts': [{'attn_implementation': 'a/b'}]},
        {'parts': ({'attn_implementation': 'a/b'},)},
        {'backbone': 'a/b', 'backbone_kwargs': {'trust_remote_code': True}},
        {'text_config': {'backbone_kwargs': {'trust_remote_code': 'yes'}}},
    ],
)
def test_configurations_that_name_code_are_refused(config):
    with pytest.raises(ValueError, match=r"The configuration in 'x\.pt' has code loaded"):
        refuse_named_code(config, 'x.pt')


@pytest.mark.parametrize(
    'config',
    [
        {},
        {'model_type': 'llama', 'attn_implementation': 'sdpa', '_attn_implementation': None},
        {'megatron_config': None, 'megatron_core': 'megatron.core', 'tokenizer_kwargs': None},
        {'auto_mapping': {'base_model_class': 'X', 'parent_library': 'transformers.models.llama.modeling_llama'}},
        {'auto_mapping': None, '_name_or_path': 'a/b'},
        {'trust_remote_code': False, 'backbone': 'resnet50', 'backbone_kwargs': {'out_indices': [1, 2]}},
    ],
)
def test_other_configurations_are_not(config):
    refuse_named_code(config, 'x.pt')


@pytest.mark.parametrize('place', [lambda names: names, lambda names: {'text_config': names}])
def test_other_names_for_settings_are_refused(place):
    """Transformers would set what they stand for, whose own name is not in the file then."""
    config = place({'attribute_map': {'innocent': '_attn_implementation'}, 'innocent': 'someone/kernels:attention'})
    with pytest.raises(ValueError, match=r"'x\.pt' has other names for its settings \(attribute_map"):
        refuse_named_code(config, 'x.pt')


@pytest.mark.parametrize(
    'config',
    [
        {'backbone': 'microsoft/resnet-50'},
        {'text_config': {'model_type': 'mask2former', 'backbone': 'a/b'}},
        {'backbone_config': {}, 'backbone_kwargs': {'out_indices': [1]}},
        {'vision_config': {'model_type': 'timm_wrapper', 'model_args': {'checkpoint_path': 'x.pth'}}},
    ],
)
def test_models_that_a_model_would_load(config):
    assert names_model(config)
    with pytest.raises(ValueError, match=r"The configuration in 'x\.pt' has another model loaded"):
        refuse_named_model(config, 'x.pt')


@pytest.mark.parametrize(
    'config', [{}, {'backbone': None, 'backbone_kwargs': {}, 'model_args': None, 'backbone_config': {'depths': [1]}}]
)
def test_models_that_load_no_other(config):
    assert not names_model(config)
    refuse_named_model(config, 'x.pt')


def test_what_transformers_saves_of_a_language_model_is_not_refused():
    for name in ('Llama', 'Qwen2', 'Mixtral', 'Gemma2', 'GPT2', 'Mpt', 'T5'):
        written = json.loads(getattr(transformers, f'{name}Config')().to_json_string(use_diff=False))
        refuse_named_code(written, name)
        refuse_named_model(written, name)
