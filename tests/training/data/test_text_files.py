# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Local text and JSONL files."""

import json

import pytest

from composer_bema.training.config import ConfigError
from composer_bema.training.data.text_files import build_text_files, find_files, read_texts
from composer_bema.training.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer({'name': 'bytes'})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'b.txt').write_text('bé\n', encoding='utf-8')
    (tmp_path / 'a.txt').write_text('a')
    (tmp_path / 'c.jsonl').write_text(''.join(json.dumps({'body': text}) + '\n\n' for text in ('one', 'two')))
    return tmp_path


def test_texts_come_in_order(folder):
    files = find_files([str(folder / '*.txt'), str(folder / 'c.jsonl')])
    assert list(read_texts(files, 'body')) == ['a', 'bé\n', 'one', 'two']


def test_blocks_of_files(folder):
    source = build_text_files(TOKENIZER, max_seq_len=2, paths=str(folder / '*.jsonl'), text_field='body', part='all')
    rows = [source.dataset[i]['input_ids'].tolist() for i in range(len(source.dataset))]
    assert TOKENIZER.convert_ids_to_tokens(sum(rows, [])) == ['o', 'n', 'e', '</s>', 't', 'w', 'o', '</s>']


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('x.txt', b'\xff', r"x\.txt' is not UTF-8 text \(byte 0\)"),
        ('x.jsonl', b'{"text": "a"}\n{', r"x\.jsonl', line 2, is not JSON"),
        ('x.jsonl', b'{"txt": "a"}', r"x\.jsonl', line 1, has no text under 'text'"),
        ('x.jsonl', b'[1]', r"x\.jsonl', line 1, has no text under 'text'"),
        ('x.txt', b'a', 'fewer than max_seq_len=8 tokens'),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build_text_files(TOKENIZER, max_seq_len=8, paths=str(tmp_path / name))


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="No file matches '.*nothing'"):
        build_text_files(TOKENIZER, max_seq_len=8, paths=[str(tmp_path / 'nothing')])
