# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens of a conversation are the assistant's, against expectations written out by hand."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from composer_bema.training.data.chat import tokenize_chat
from composer_bema.training.tokenizers import build_tokenizer

# Each message is `<role letter>content|`; the assistant is asked with `<a>`.
TAGGED = (
    '{% for m in messages %}<{{ m.role[0] }}>'
    '{% if m.role == "assistant" %}{% generation %}{{ m.content }}|{% endgeneration %}'
    '{% else %}{{ m.content }}|{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}<a>{% endif %}'
)
PLAIN = TAGGED.replace('{% generation %}', '').replace('{% endgeneration %}', '')
# Forgets what the assistant said before its last turn, as templates of reasoning models do.
FORGETFUL = PLAIN.replace('{{ m.content }}|{% else %}', '{% if loop.last %}{{ m.content }}{% endif %}|{% else %}')

CONVERSATION = [
    {'role': 'system', 'content': 'be'},
    {'role': 'user', 'content': 'hi'},
    {'role': 'assistant', 'content': 'yo'},
    {'role': 'user', 'content': 'so'},
    {'role': 'assistant', 'content': 'ok'},
]
RENDERED = '<s>be|<u>hi|<a>yo|<u>so|<a>ok|'
ASSISTANT = '...............yo|.........ok|'


def fast_tokenizer(template):
    """One token a character, and knows which character that is."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(set(RENDERED)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def byte_tokenizer(template):
    return build_tokenizer({'name': 'bytes'}) if template is None else _with_template(template)


def _with_template(template):
    tokenizer = build_tokenizer({'name': 'bytes'})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize('make', [fast_tokenizer, byte_tokenizer])
@pytest.mark.parametrize('template', [TAGGED, PLAIN])
def test_each_way_finds_the_assistant(make, template):
    tokenizer = make(template)
    tokens, spans = tokenize_chat(tokenizer, CONVERSATION)
    assert tokens == tokenizer(RENDERED, add_special_tokens=False)['input_ids']
    assert len(tokens) == len(RENDERED) == len(ASSISTANT)
    found = ['.'] * len(tokens)
    for start, stop in spans:
        found[start:stop] = RENDERED[start:stop]
    assert ''.join(found) == ASSISTANT
    assert len(spans) == 2


def test_a_token_across_the_boundary_belongs_to_the_side_of_its_end():
    """`>y` ends in the assistant's first letter."""
    vocabulary = {'<u>hi|<a': 0, '>y': 1, 'o|': 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='>y'))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split('>y', 'isolated'), pre_tokenizers.Split('o|', 'isolated')],
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=PLAIN)
    assert tokenize_chat(fast, CONVERSATION[1:3]) == ([0, 1, 2], [(1, 3)])


def test_a_template_that_rewrites_the_past_is_an_error():
    with pytest.raises(ValueError, match=r'message 2 differently .* use a template with \{% generation %\} tags'):
        tokenize_chat(fast_tokenizer(FORGETFUL), CONVERSATION)


@pytest.mark.parametrize('messages', [CONVERSATION[:2], CONVERSATION[2:4]])
def test_what_answers_nothing_is_no_turn(messages):
    assert tokenize_chat(fast_tokenizer(PLAIN), messages)[1] == []


def test_without_a_template_there_is_an_error():
    with pytest.raises(ValueError, match='chat_template'):
        tokenize_chat(byte_tokenizer(None), CONVERSATION)
