# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Conversations as training data: targets, cutting, dropping, splitting, packing."""

import json
import logging

import pytest

from composer_bema.training.config import ConfigError
from composer_bema.training.data.finetuning import build_finetuning, target_mask
from composer_bema.training.data.loaders import IGNORED_LABEL
from composer_bema.training.tokenizers import build_tokenizer

TEMPLATE = (
    '{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<a>{% endif %}'
)


@pytest.fixture(scope='module')
def tokenizer():
    tokenizer = build_tokenizer({'name': 'bytes'})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def make(tmp_path, tokenizer):
    """Builds the loader's dataset from lists of alternating user and assistant messages."""

    def make(conversations, **arguments):
        path = tmp_path / 'chat.jsonl'
        roles = ('user', 'assistant')
        rows = [
            {'messages': [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]}
            for texts in conversations
        ]
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        hf_kwargs = {'data_files': str(path), 'cache_dir': str(tmp_path / 'cache')}
        arguments = {'max_seq_len': 64, 'part': 'all', 'hf_name': 'json', 'hf_kwargs': hf_kwargs} | arguments
        return build_finetuning(tokenizer, **arguments)

    return make


def text_of(tokens):
    return ''.join('.' if token == IGNORED_LABEL else chr(token - 3) for token in tokens.tolist())


def test_all_responses_are_targets(make):
    sample = make([['a', 'b', 'c', 'd']]).dataset[0]
    assert text_of(sample['input_ids']) == '<u>a|<a>b|<u>c|<a>d|'
    assert text_of(sample['labels']) == '........b|........d|'


def test_the_last_response_or_everything(make):
    last = make([['a', 'b', 'c', 'd']], target_responses='last').dataset[0]
    assert text_of(last['labels']) == '..................d|'
    everything = make([['a', 'b']], target_prompts='all').dataset[0]
    assert text_of(everything['labels']) == '<u>a|<a>b|'


def test_mask_of_tokens():
    assert target_mask(5, [(1, 2), (3, 5)], 'all', 'none') == [False, True, False, True, True]
    assert target_mask(5, [(1, 2), (3, 5)], 'last', 'none') == [False, False, False, True, True]
    assert target_mask(2, [], 'all', 'none') == [False, False]


def test_long_conversations_are_cut(make):
    sample = make([['a', 'bcdefgh']], max_seq_len=10).dataset[0]
    assert text_of(sample['input_ids']) == '<u>a|<a>bc'


def test_dropped_conversations_are_counted(make, caplog):
    conversations = [['a', 'b'], ['a', 'b' * 30], ['a' * 20, 'b'], ['a']]
    with caplog.at_level(logging.INFO, 'composer_bema'):
        dataset = make(conversations, max_seq_len=16, max_tokens=32).dataset
    # The second is longer than 32 tokens; the third's response lies behind the cut; the fourth has none.
    assert [text_of(dataset[i]['input_ids']) for i in range(len(dataset))] == ['<u>a|<a>b|']
    assert 'Kept 1 of 4 conversations: 1 are longer than max_tokens=32, 2 others have no target.' in caplog.text


def test_nothing_left(make):
    with pytest.raises(ConfigError, match=r'none of the 1 conversations is left \(max_tokens=2\)'):
        make([['a', 'b']], max_tokens=2)


def test_parts(make):
    conversations = [[str(i), 'x'] for i in range(20)]
    parts = [make(conversations, part=part, train_fraction=0.9).dataset for part in ('train', 'held_out')]
    texts = [{text_of(part[i]['input_ids']) for i in range(len(part))} for part in parts]
    assert [len(part) for part in texts] == [18, 2]
    assert texts[0] | texts[1] == {f'<u>{i}|<a>x|' for i in range(20)}


def test_packing(make):
    source = make([['a', 'b'], ['c', 'd'], ['e', 'f' * 8]], packing=True, max_seq_len=20)
    batch = source.collate([source.dataset[i] for i in range(len(source.dataset))])
    assert batch['input_ids'].shape == (2, 20)
    assert text_of(batch['labels'][1]) == '........b|........d|'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'target_responses': 'first'}, "target_responses must be one of all, last, not 'first'"),
        ({'target_prompts': 'some'}, "target_prompts must be one of none, all, not 'some'"),
        ({'split': 'test'}, "hf_name: cannot load split 'test' of 'json'"),
        ({'hf_name': '/no/where', 'hf_kwargs': None}, "hf_name: cannot load split 'train' of '/no/where'"),
    ],
)
def test_mistakes(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make([['a', 'b']], **arguments)


def test_a_conversation_that_cannot_be_rendered_is_shown(make, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, 'chat_template', '{{ raise_exception("roles must alternate") }}')
    with pytest.raises(ConfigError, match="roles must alternate .in the conversation that begins .*'content': 'a'"):
        make([['a', 'b']])


@pytest.mark.parametrize(
    ('messages', 'message'),
    [
        ([], r'a conversation must be a list of messages, not \[\]'),
        (None, 'a conversation must be a list of messages, not None'),
        ('abc', "a conversation must be a list of messages, not 'abc'"),
        ([{'role': 'user'}], 'message 0 must have a text as its role and one as its content'),
        ([{'role': 'user', 'content': 3}], 'message 0 must have a text as its role and one as its content'),
        (['abc'], 'message 0 must have a text as its role'),
    ],
)
def test_malformed_conversations(tmp_path, tokenizer, messages, message):
    path = tmp_path / 'rows.jsonl'
    path.write_text(json.dumps({'messages': messages}) + '\n')
    with pytest.raises(ConfigError, match=message):
        build_finetuning(
            tokenizer, 8, 'json', hf_kwargs={'data_files': str(path), 'cache_dir': str(tmp_path)}, part='all'
        )


def test_a_broken_line_is_named_with_its_file_and_number(tmp_path, tokenizer):
    path = tmp_path / 'rows.jsonl'
    path.write_text('{"messages": []}\n{"messages": [\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl', line 2, is not JSON"):
        build_finetuning(tokenizer, 8, 'json', hf_kwargs={'data_files': str(path), 'cache_dir': str(tmp_path)})


def test_a_column_of_messages_is_needed(tmp_path, tokenizer):
    path = tmp_path / 'rows.jsonl'
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match="has no 'messages' column, only prompt"):
        build_finetuning(tokenizer, 8, 'json', hf_kwargs={'data_files': str(path), 'cache_dir': str(tmp_path)})
