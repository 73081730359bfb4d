# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Hugging Face folders: what `from_pretrained` reads is what was written, for models and tokenizers of many kinds."""

import builtins
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from composer.models import HuggingFaceModel
from safetensors.torch import load_file

from composer_bema.formats import huggingface
from composer_bema.formats.foreign_code import ForeignCodeError
from composer_bema.formats.huggingface import (
    model_without_memory,
    new_folder,
    pretrained_writer,
    write_adapter,
    write_tokenizer,
    write_weights,
)
from composer_bema.formats.tensors import LazyTensor
from tests.formats.foreign import with_configuration
from tests.formats.runs import TINY, lora_config, make_model

T5 = {'d_model': 8, 'd_kv': 4, 'd_ff': 12, 'num_layers': 1, 'num_heads': 2, 'vocab_size': 32}
BERT = {'hidden_size': 8, 'intermediate_size': 12, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'vocab_size': 32}
MODELS = {
    'tied': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=True)),
    'untied': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
    'encoder and decoder': lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    'encoder and decoder, untied': lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, tie_word_embeddings=False)
    ),
    'masked': lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    'classifier': lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3)),
    'batch norm': lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3)
    ),
}


def entry_of(model, tokenizer=None):
    return HuggingFaceModel(model, tokenizer).get_metadata()


def weights_of(model, dtype=None):
    weights = {f'model.{name}': LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    return weights if dtype is None else {name: tensor.to(dtype) for name, tensor in weights.items()}


def write_pretrained(folder, entry, weights, **kwargs):
    specs = {name: tensor.spec for name, tensor in weights.items()}
    write_weights(pretrained_writer(folder, entry, specs, **kwargs), weights)


def assert_same_state(model, other):
    state = other.state_dict()
    assert set(model.state_dict()) == set(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize('name', MODELS)
def test_models_come_back(tmp_path, name):
    model = MODELS[name]()
    write_pretrained(tmp_path, entry_of(model), weights_of(model), source='x.pt')
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_state(model, loaded)
    assert json.loads((tmp_path / 'config.json').read_text())['architectures'] == [type(model).__name__]
    # No tensor is there twice.
    assert len(load_file(tmp_path / 'model.safetensors')) == len({t.data_ptr() for t in model.state_dict().values()})
    assert (tmp_path / 'generation_config.json').exists() == model.can_generate()


def test_the_dtype_is_that_of_the_weights(tmp_path):
    model = MODELS['untied']()
    write_pretrained(tmp_path, entry_of(model), weights_of(model, torch.bfloat16), source='x.pt')
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype='auto')
    assert loaded.dtype == torch.bfloat16
    assert_same_state(model.to(torch.bfloat16), loaded)


def test_large_models_are_in_several_files(tmp_path):
    model = MODELS['tied']()
    write_pretrained(tmp_path, entry_of(model), weights_of(model), source='x.pt', max_shard_size='2KB')
    assert len(list(tmp_path.glob('model-*-of-*.safetensors'))) > 2
    assert not (tmp_path / 'model.safetensors').exists()
    assert_same_state(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_weights_that_only_the_user_has_tied_are_written_twice(tmp_path):
    model = MODELS['untied']()
    model.lm_head.weight = model.model.embed_tokens.weight
    write_pretrained(tmp_path, entry_of(model), weights_of(model), source='x.pt')
    assert_same_state(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ('class_name', 'architectures'),
    [
        ('torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel', None),
        ('torch.distributed.fsdp._fully_shard._fully_shard.FSDPLlamaForCausalLM', None),
        ('llmfoundry.models.hf.hf_causal_lm.Unheard', ['LlamaForCausalLM']),
        ('os.system', ['../../x', 'PreTrainedModel', 'AutoModel', 'BertModel', 'LlamaModel']),
    ],
)
def test_the_class_is_found_though_fsdp_hides_it(tmp_path, class_name, architectures):
    model = MODELS['tied']()
    entry = entry_of(model)
    entry['model']['config'].update({'class': class_name})
    entry['model']['config']['content']['architectures'] = architectures
    write_pretrained(tmp_path, entry, weights_of(model), source='x.pt')
    assert json.loads((tmp_path / 'config.json').read_text())['architectures'] == ['LlamaForCausalLM']
    assert 'lm_head.weight' not in load_file(tmp_path / 'model.safetensors')


def test_a_model_that_transformers_does_not_know_is_written_as_it_is(tmp_path):
    """Nobody says what is tied, so that every name gets its tensor."""
    model = MODELS['tied']()
    entry = entry_of(model)
    entry['model']['config']['content'].update({'model_type': 'unheard', 'auto_map': {'AutoConfig': 'm.C'}})
    write_pretrained(tmp_path, entry, weights_of(model), source='x.pt')
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config == {**entry['model']['config']['content'], 'torch_dtype': 'float32'}
    written = load_file(tmp_path / 'model.safetensors')
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())
    assert set(written) == set(model.state_dict())


def test_a_class_that_cannot_be_made_without_memory():
    class Curious(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.depth = int(torch.linspace(0, 1, 3).sum().item())

    assert model_without_memory(Curious, SimpleNamespace()) is None


def test_tensors_beside_the_model_are_left_out_and_counted(tmp_path, caplog):
    model = MODELS['untied']()
    weights = {**weights_of(model), 'head.weight': LazyTensor.of(torch.ones(2))}
    with caplog.at_level(logging.WARNING):
        write_pretrained(tmp_path, entry_of(model), weights, source='x.pt')
    assert '1 tensors are not of the Hugging Face model and were left out.' in caplog.messages
    assert_same_state(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


# Adapters


@pytest.mark.parametrize('with_base', [False, True])
def test_adapters_come_back(tmp_path, with_base):
    peft = pytest.importorskip('peft')
    composer_model = make_model(lora=True)
    composer_model.should_save_peft_only = not with_base
    weights = {name: LazyTensor.of(tensor) for name, tensor in composer_model.state_dict().items()}
    assert len(weights) == (29 if with_base else 8)
    write_pretrained(tmp_path, composer_model.get_metadata(), weights, source='x.pt')
    assert {'adapter_config.json', 'adapter_model.safetensors'} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / 'model.safetensors').exists()
    loaded = peft.PeftModel.from_pretrained(make_model().model, tmp_path)
    assert_same_state(composer_model.model, loaded)
    # From the model at hand the same is written.
    write_adapter(tmp_path / 'peft', composer_model.model, composer_model.model.state_dict())
    written, expected = (load_file(folder / 'adapter_model.safetensors') for folder in (tmp_path, tmp_path / 'peft'))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_an_adapter_of_an_unknown_base_model_is_refused(tmp_path):
    pytest.importorskip('peft')
    composer_model = make_model(lora=True)
    entry = composer_model.get_metadata()
    entry['model']['config']['content']['model_type'] = 'unheard'
    with pytest.raises(ValueError, match=r"The adapter in 'x\.pt' cannot be told from its base model"):
        write_pretrained(tmp_path, entry, {}, source='x.pt')


def test_an_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip('peft')
    entry = make_model(lora=True).get_metadata()
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match=r"pip install 'composer_bema\[peft\]'"):
        write_pretrained(tmp_path, entry, {}, source='x.pt')


def test_nothing_is_loaded_that_the_configuration_of_an_adapter_names(tmp_path, monkeypatch):
    """PEFT would import the module to see whether a layer is one of its."""
    pytest.importorskip('peft')
    (tmp_path / 'named_by_a_checkpoint.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    entry = make_model(lora=True).get_metadata()
    entry['model']['peft_config']['content'] |= {'megatron_config': {'a': 1}, 'megatron_core': 'named_by_a_checkpoint'}
    with pytest.raises(ValueError, match=r"The configuration in 'x\.pt' has code loaded \(megatron_config"):
        write_pretrained(tmp_path, entry, {}, source='x.pt')
    assert 'named_by_a_checkpoint' not in sys.modules


def test_nothing_is_loaded_that_the_configuration_of_a_model_names(tmp_path):
    model = MODELS['untied']()
    entry = entry_of(model)
    entry['model']['config']['content']['_attn_implementation'] = 'someone/kernels:attention'
    with pytest.raises(ValueError, match=r"The configuration in 'x\.pt' has code loaded \(_attn_implementation"):
        write_pretrained(tmp_path, entry, weights_of(model), source='x.pt')


def entry_with_backbone(backbone):
    entry = entry_of(MODELS['untied']())
    content = {'model_type': 'upernet', 'use_timm_backbone': False, 'use_pretrained_backbone': False}
    entry['model']['config'] |= {
        'content': {**content, 'backbone': str(backbone)},
        'class': 'transformers.UperNetForSemanticSegmentation',
    }
    return entry


def test_a_model_that_would_load_another_is_not_made(tmp_path):
    """Its weights and its configuration are written, as those of a model that transformers does not know."""
    mark = tmp_path / 'has-run'
    entry = entry_with_backbone(with_configuration(tmp_path / 'backbone', mark))
    (tmp_path / 'out').mkdir()
    write_pretrained(tmp_path / 'out', entry, weights_of(MODELS['untied']()), source='x.pt')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['backbone'] == str(tmp_path / 'backbone')
    assert load_file(tmp_path / 'out' / 'model.safetensors')
    assert not mark.exists()


def test_code_does_not_run_where_it_was_not_foreseen(tmp_path, monkeypatch):
    mark = tmp_path / 'has-run'
    entry = entry_with_backbone(with_configuration(tmp_path / 'backbone', mark))
    monkeypatch.setattr(huggingface, 'names_model', lambda config: False)
    monkeypatch.setattr(builtins, 'input', lambda question: 'y')
    with pytest.raises(ForeignCodeError, match=r"'x\.pt' has code of its own loaded"):
        write_pretrained(tmp_path, entry, weights_of(MODELS['untied']()), source='x.pt')
    assert not mark.exists()


def test_an_adapter_of_a_base_model_that_would_load_another_is_refused(tmp_path):
    pytest.importorskip('peft')
    entry = make_model(lora=True).get_metadata()
    entry['model']['config']['content']['backbone'] = 'someone/model'
    with pytest.raises(ValueError, match=r"The configuration in 'x\.pt' has another model loaded \(backbone"):
        write_pretrained(tmp_path, entry, {}, source='x.pt')


def test_lora_settings_survive(tmp_path):
    pytest.importorskip('peft')
    composer_model = make_model(lora=True)
    weights = {name: LazyTensor.of(tensor) for name, tensor in composer_model.state_dict().items()}
    write_pretrained(tmp_path, composer_model.get_metadata(), weights, source='x.pt')
    written = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert (written['r'], sorted(written['target_modules'])) == (2, sorted(lora_config().target_modules))


# Tokenizers


def fast_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(['<pad>', '<unk>', 'the', 'cat', 'sat', 'é'])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token='<unk>', pad_token='<pad>', chat_template='{{ messages }}'
    )


@pytest.mark.parametrize('make', [fast_tokenizer, lambda: transformers.ByT5Tokenizer(extra_ids=0)])
def test_tokenizers_come_back(tmp_path, make):
    tokenizer = make()
    entry = entry_of(MODELS['untied'](), tokenizer)['tokenizer']
    write_tokenizer(tmp_path, entry)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = 'the cat sat é'
    assert loaded(text)['input_ids'] == tokenizer(text)['input_ids']
    assert loaded.chat_template == tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / 'own')
    assert {path.name for path in tmp_path.iterdir()} - {'own'} == {path.name for path in (tmp_path / 'own').iterdir()}


def test_files_of_all_kinds(tmp_path):
    entry = {
        'vocab': {'file_extension': '.json', 'content': {'é': 1}},
        'special_tokens_map.json': {'file_extension': '.json'},
        'merges.txt': {'file_extension': '.txt', 'content': ['a b', 'c d', '']},
        'spiece.model': {'file_extension': '.model', 'content': b'\x00\xff'},
        'chat_template.jinja': {'file_extension': '.jinja', 'content': '{{ x }}'},
    }
    write_tokenizer(tmp_path, entry)
    assert json.loads((tmp_path / 'vocab.json').read_text()) == {'é': 1}
    assert json.loads((tmp_path / 'special_tokens_map.json').read_text()) == {}
    assert (tmp_path / 'merges.txt').read_text() == 'a b\nc d\n'
    assert (tmp_path / 'spiece.model').read_bytes() == b'\x00\xff'
    assert (tmp_path / 'chat_template.jinja').read_text() == '{{ x }}'


@pytest.mark.parametrize('name', ['../x.json', '/tmp/x.json', 'a/x.json', '../x'])
def test_files_outside_the_folder_are_refused(tmp_path, name):
    entry = entry_of(MODELS['untied']())
    entry['tokenizer'] = {name: {'file_extension': '.json', 'content': {}}}
    (tmp_path / 'out').mkdir()
    with pytest.raises(ValueError, match=r"The tokenizer in 'x\.pt' cannot be written: '.*x\.json' is no plain name"):
        write_pretrained(tmp_path / 'out', entry, weights_of(MODELS['untied']()), source='x.pt')
    assert not (tmp_path / 'x.json').exists()


@pytest.mark.parametrize('entry', [{}, {'model': {}}, {'model': {'config': {'content': {}}}}, {'model': 3}])
def test_an_entry_that_lacks_something_is_refused(tmp_path, entry):
    with pytest.raises(ValueError, match=r"What 'x\.pt' says of its Hugging Face model is incomplete"):
        write_pretrained(tmp_path, entry, {}, source='x.pt')


# Folders that are there when they are complete


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / 'a' / 'b') as folder:
        (folder / 'file').write_text('x')
        assert not (tmp_path / 'a' / 'b').exists()
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['b']
    assert (tmp_path / 'a' / 'b' / 'file').read_text() == 'x'


def test_what_fails_leaves_nothing_and_replaces_nothing(tmp_path):
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'file').touch()
    for name in ('new', 'old'):
        with pytest.raises(KeyError), new_folder(tmp_path / name, replace=True) as folder:
            (folder / 'half').touch()
            raise KeyError
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*')] == ['old', 'old/file']


@pytest.mark.parametrize('error', [KeyError, KeyboardInterrupt])
def test_the_folders_that_were_made_for_it_go_with_it(tmp_path, error):
    """But for those that were there before, or hold something else by now."""
    (tmp_path / 'there').mkdir()
    for busy in (False, True):
        with pytest.raises(error), new_folder(tmp_path / 'there' / 'a' / 'b' / 'c') as folder:
            if busy:
                (tmp_path / 'there' / 'a' / 'x').touch()
            (folder / 'half').touch()
            raise error
        left = {path.name for path in tmp_path.rglob('*')}
        assert left == ({'there', 'a', 'x'} if busy else {'there'})


def test_a_folder_is_replaced_only_if_asked(tmp_path):
    (tmp_path / 'old').mkdir()
    with new_folder(tmp_path / 'old') as folder:
        (folder / 'file').touch()
    with (
        pytest.raises(FileExistsError, match=r"old' exists and is not an empty folder"),
        new_folder(tmp_path / 'old'),
    ):
        raise AssertionError('it is not to be entered')
    with new_folder(tmp_path / 'old', replace=True) as folder:
        (folder / 'another').touch()
    assert [path.name for path in (tmp_path / 'old').iterdir()] == ['another']
    (tmp_path / 'taken').touch()
    with pytest.raises(FileExistsError), new_folder(tmp_path / 'taken'):
        raise AssertionError('it is not to be entered')


@pytest.mark.parametrize(
    'name',
    ['config', 'adapter_config.json', 'averaging.json', 'model.safetensors', 'pytorch_model.bin', 'model.index.json'],
)
def test_files_of_the_model_are_not_replaced(tmp_path, name):
    entry = entry_of(MODELS['untied']())
    extension = f'.{name.rpartition(".")[2]}' if '.' in name else '.json'
    entry['tokenizer'] = {name: {'file_extension': extension, 'content': {}}}
    with pytest.raises(ValueError, match=r"The tokenizer in 'x\.pt' cannot be written: '.*' is a file of the model"):
        write_pretrained(tmp_path, entry, weights_of(MODELS['untied']()), source='x.pt')
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == 'llama'


def test_no_file_of_a_tokenizer_is_written_twice(tmp_path):
    entry = {name: {'file_extension': '.json', 'content': {}} for name in ('vocab', 'vocab.json')}
    with pytest.raises(ValueError, match=r"'vocab\.json' is there already"):
        write_tokenizer(tmp_path, entry)
