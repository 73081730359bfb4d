# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Texts that every model of an evaluation reads alike."""

import json
import random
from unittest import mock

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.data.texts import FirstBatches, RunTexts, TextFiles
from composer_bema.training.tokenizers import build_tokenizer
from tests.training.tiny import tiny_settings, write_yaml


class Shuffling:
    """Other batches each time, as a streaming loader that shuffles has."""

    def __iter__(self):
        return iter(random.sample(range(1000), 10))


def test_the_first_batches_stay_the_same():
    batches = FirstBatches(Shuffling(), 3)
    assert len(list(batches)) == 3
    assert list(batches) == list(batches)


def test_all_batches_are_read_again():
    assert [list(FirstBatches([1, 2], None)) for _ in range(2)] == [[1, 2], [1, 2]]


def test_texts_of_a_run(tmp_path, make_causal_lm):
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)))
    texts = RunTexts(config, batch_size=2, batches=1)(build_tokenizer({'name': 'bytes'}), make_causal_lm())
    # Two evaluators of the same text count once.
    assert list(texts) == ['train', 'held_out']
    first, again = (next(iter(texts['train'])) for _ in range(2))
    assert torch.equal(first['input_ids'], again['input_ids'])
    assert first['input_ids'].shape == (2, 32)


@pytest.mark.parametrize(('wanted', 'context', 'length'), [(None, 64, 64), (None, 4096, 1024), (32, 64, 32)])
def test_blocks_of_files_fit_into_the_context(tmp_path, make_causal_lm, wanted, context, length):
    (tmp_path / 'text.txt').write_text('a' * 2000)
    build = TextFiles({'a': [str(tmp_path / 'text.txt')]}, wanted, batch_size=1)
    texts = build(build_tokenizer({'name': 'bytes'}), make_causal_lm(max_position_embeddings=context))
    assert next(iter(texts['a']))['input_ids'].shape == (1, length)


def test_files_need_no_end_of_text(tmp_path, make_causal_lm):
    (tmp_path / 'text.txt').write_text('is it so')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'is': 5, 'it': 6, 'so': 7}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    texts = TextFiles({'a': [str(tmp_path / 'text.txt')]}, 3, batch_size=1)(tokenizer, make_causal_lm())
    assert next(iter(texts['a']))['input_ids'].tolist() == [[5, 6, 7]]


@pytest.mark.parametrize('place', ['train_loader', 'eval_loader'])
def test_preference_pairs_are_no_texts(tmp_path, place):
    settings = tiny_settings(tmp_path)
    settings[place] = {'name': 'toy_preferences', 'dataset': {}}
    config = load_config(write_yaml(tmp_path, settings))
    with pytest.raises(ConfigError, match=f'^{place}.name: toy_preferences makes preference pairs, .* --text NAME'):
        RunTexts(config, batch_size=2)


def test_packed_texts_are_for_models_that_keep_them_apart(tmp_path, make_causal_lm):
    turns = [{'role': 'user', 'content': 'is it'}, {'role': 'assistant', 'content': 'so'}]
    (tmp_path / 'chat.jsonl').write_text(4 * (json.dumps({'messages': turns}) + '\n'))
    template = '{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}'
    hf_kwargs = {'data_files': str(tmp_path / 'chat.jsonl'), 'cache_dir': str(tmp_path / 'cache')}
    dataset = {'hf_name': 'json', 'hf_kwargs': hf_kwargs, 'part': 'all', 'packing': True}
    settings = tiny_settings(tmp_path) | {'eval_loader': {'name': 'finetuning', 'dataset': dataset}}
    build = RunTexts(load_config(write_yaml(tmp_path, settings)), batch_size=2)
    tokenizer = build_tokenizer({'name': 'bytes', 'kwargs': {'chat_template': template}})
    model = make_causal_lm(vocab_size=259)
    assert 'sequence_id' in next(iter(build(tokenizer, model)['held_out']))
    with (
        mock.patch('composer_bema.training.data.packing.keeps_documents_apart', lambda model: False),
        pytest.raises(ConfigError, match=r'^eval_loader.dataset.packing: LlamaForCausalLM lets packed conversations'),
    ):
        build(tokenizer, model)
