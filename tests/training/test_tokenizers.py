# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tokenizers by name."""

import pytest

from composer_bema.training.config import ConfigError
from composer_bema.training.tokenizers import build_tokenizer


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
