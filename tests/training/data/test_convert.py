# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Text files to MDS and back through the streaming loader."""

import json

import numpy as np
import pytest
from streaming import MDSWriter

from composer_bema.training.config import ConfigError
from composer_bema.training.data.convert import convert_to_mds
from composer_bema.training.data.loaders import build_data_spec
from composer_bema.training.data.streaming import build_streaming_text
from composer_bema.training.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer({'name': 'bytes'})


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text('abcdefghij')
    return str(path)


def samples_of(folder, max_seq_len=64):
    dataset = build_streaming_text(TOKENIZER, 1, max_seq_len, local=str(folder)).dataset
    return [dataset[i]['input_ids'].tolist() for i in range(len(dataset))]


def test_tokens_round_trip(tmp_path, text_file):
    out = tmp_path / 'mds'
    assert convert_to_mds([text_file], out, TOKENIZER, concat_tokens=4, compression='zstd') == 2
    letters = [ord(letter) + 3 for letter in 'abcdefgh']
    assert samples_of(out) == [letters[:4], letters[4:]]
    assert samples_of(out, max_seq_len=3) == [letters[:3], letters[4:7]]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_texts_are_tokenized_when_read(tmp_path, text_file):
    assert convert_to_mds([text_file], tmp_path / 'mds') == 1
    assert samples_of(tmp_path / 'mds') == [[*(ord(letter) + 3 for letter in 'abcdefghij'), 1]]


@pytest.mark.parametrize('column', ['ndarray:int32', 'ndarray:uint16'])
def test_tokens_as_arrays(tmp_path, column):
    """What newer converters of llm-foundry write."""
    with MDSWriter(out=str(tmp_path / 'mds'), columns={'tokens': column}) as writer:
        writer.write({'tokens': np.array([3, 4, 5], dtype=column.partition(':')[2])})
    assert samples_of(tmp_path / 'mds') == [[3, 4, 5]]


def test_batches(tmp_path, text_file):
    convert_to_mds([text_file], tmp_path / 'mds', TOKENIZER, concat_tokens=3)
    source = build_streaming_text(TOKENIZER, 2, 3, local=str(tmp_path / 'mds'))
    spec = build_data_spec(source, 2, drop_last=False)
    batches = list(spec.dataloader)
    assert [tuple(batch['input_ids'].shape) for batch in batches] == [(2, 3), (1, 3)]
    assert spec.get_num_tokens_in_batch(batches[0]) == 6


def test_nothing_is_left_of_a_failure(tmp_path, text_file):
    with pytest.raises(ConfigError, match='not one sample of 64 tokens'):
        convert_to_mds([text_file], tmp_path / 'mds', TOKENIZER, concat_tokens=64)
    assert [path.name for path in tmp_path.iterdir()] == ['text.txt']


def test_what_is_there_is_not_replaced(tmp_path, text_file):
    with pytest.raises(ConfigError, match='exists already'):
        convert_to_mds([text_file], tmp_path)


def test_a_tokenizer_needs_a_length(tmp_path, text_file):
    with pytest.raises(ConfigError, match='go together'):
        convert_to_mds([text_file], tmp_path / 'mds', TOKENIZER)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [({}, 'needs local, remote or both'), ({'local': '/no/where', 'split': 'val'}, "in '/no/where/val'")],
)
def test_no_data_set(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_streaming_text(TOKENIZER, 1, 8, **arguments)


@pytest.mark.parametrize('name', ['../elsewhere.mds', '/elsewhere.mds'])
def test_an_index_that_names_files_elsewhere_is_refused(text_file, tmp_path, name):
    """With a remote, streaming would download them to there."""
    convert_to_mds([text_file], tmp_path / 'mds')
    index = json.loads((tmp_path / 'mds/index.json').read_text())
    index['shards'][0]['raw_data']['basename'] = name
    (tmp_path / 'mds/index.json').write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"names the file '{name}', which is not in its folder"):
        samples_of(tmp_path / 'mds')


def test_pickled_samples_are_refused(tmp_path):
    with MDSWriter(out=str(tmp_path / 'mds'), columns={'tokens': 'pkl'}) as writer:
        writer.write({'tokens': [3, 4]})
    with pytest.raises(ValueError, match='unsafe'):
        samples_of(tmp_path / 'mds')
