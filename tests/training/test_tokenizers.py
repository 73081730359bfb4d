# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tokenizers by name."""

import builtins
import json

import pytest

from composer_bema.formats.foreign_code import ForeignCodeError
from composer_bema.training.config import ConfigError
from composer_bema.training.tokenizers import build_tokenizer
from tests.formats.foreign import with_configuration


def test_bytes():
    tokenizer = build_tokenizer({'name': 'bytes'})
    assert len(tokenizer) == 259
    assert tokenizer('aé', add_special_tokens=False)['input_ids'] == [ord('a') + 3, 0xC3 + 3, 0xA9 + 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_kwargs_are_checked():
    with pytest.raises(ConfigError, match=r'tokenizer\.kwargs\.extra_ids is not a setting'):
        build_tokenizer({'name': 'bytes', 'kwargs': {'extra_ids': 3}})


def test_folder_round_trip(tmp_path):
    build_tokenizer({'name': 'bytes'}).save_pretrained(tmp_path)
    template = '{{ messages }}'
    tokenizer = build_tokenizer({'name': str(tmp_path), 'kwargs': {'chat_template': template}})
    assert len(tokenizer) == 259
    assert tokenizer.chat_template == template


def test_nothing_by_that_name(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer.name: '.*nothing' is none of our tokenizers"):
        build_tokenizer({'name': str(tmp_path / 'nothing')})


def test_code_that_a_part_of_a_tokenizer_names_does_not_run(tmp_path, monkeypatch):
    """RagTokenizer is made of two others, for which transformers asks on the terminal."""
    monkeypatch.setattr(builtins, 'input', lambda question: 'y')
    # It has no tokenizer of transformers, which would be taken first.
    encoder = {'model_type': 'resnet'}
    config = {'model_type': 'rag', 'question_encoder': encoder, 'generator': {'model_type': 'bart'}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'RagTokenizer'}))
    with_configuration(tmp_path / 'question_encoder_tokenizer', tmp_path / 'has-run')
    named = {'tokenizer_class': 'Unheard', 'auto_map': {'AutoTokenizer': ['own.Own', None]}}
    (tmp_path / 'question_encoder_tokenizer' / 'tokenizer_config.json').write_text(json.dumps(named))
    with pytest.raises(ForeignCodeError, match=f"'{tmp_path}' has code of its own loaded"):
        build_tokenizer({'name': str(tmp_path)})
    assert not (tmp_path / 'has-run').exists()
