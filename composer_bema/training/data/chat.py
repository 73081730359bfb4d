# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A conversation as tokens, and which of them the assistant said.

Two ways, the first where it can be had:

- a chat template with ``{% generation %}`` tags says itself which text is the assistant's;
- otherwise the conversation is rendered message by message: what an assistant's message adds behind the prompt that
  asks for it is the assistant's. That only holds when each rendering begins with the one before, which is checked.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ['Span', 'assistant_spans', 'check_messages', 'render_reply', 'tokenize_chat', 'tokenize_reply']

Span = tuple[int, int]

GENERATION_TAG = re.compile(r'\{%-?\s*generation\b')


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[int], list[Span]]:
    """Render a conversation with the tokenizer's chat template and tokenize it.

    Returns:
        The tokens, and for each of the assistant's turns the half-open range of tokens that the assistant produces (its
        end of turn included, the header in front of it not).

    Raises:
        ValueError: There is no chat template, it cannot render the conversation, or a rendering does not begin with the
            rendering of the messages before.
    """
    template = tokenizer.get_chat_template()
    if GENERATION_TAG.search(template) and tokenizer.is_fast:
        encoded: Any = tokenizer.apply_chat_template(
            list(messages),  # pyright: ignore[reportArgumentType]
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded['input_ids']), _runs([bool(flag) for flag in encoded['assistant_masks']])
    text, spans = assistant_spans(tokenizer, messages)
    return _tokenize_spans(tokenizer, text, spans)


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
) -> tuple[str, list[Span]]:
    """The rendered conversation and the ranges of its characters that are the assistant's, by incremental rendering.

    A message of the assistant that opens the conversation answers nothing, and is left out.
    """
    text = _render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message['role'] != 'assistant' or index == 0:
            continue
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)
        until = _render(tokenizer, messages[: index + 1])
        if not until.startswith(prompt) or not text.startswith(until):
            raise ValueError(
                f'the chat template renders message {index} differently with and without the messages after it, so its '
                'tokens cannot be told apart; use a template with {% generation %} tags.',
            )
        spans.append((len(prompt), len(until)))
    return text, spans


def render_reply(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Mapping[str, Any]],
    reply: Sequence[Mapping[str, Any]],
) -> tuple[str, str]:
    """The rendered prompt, up to where the assistant begins, and what the messages of a reply add behind it.

    Raises:
        ValueError: There is no chat template, or the conversation does not begin with the rendered prompt.
    """
    before = _render(tokenizer, prompt, add_generation_prompt=True)
    text = _render(tokenizer, [*prompt, *reply])
    if not text.startswith(before):
        raise ValueError(
            'the chat template renders the prompt differently with and without the reply behind it, so their tokens '
            'cannot be told apart; use a template whose conversations begin with what asks for the reply.',
        )
    return before, text[len(before) :]


def tokenize_reply(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str) -> tuple[list[int], int]:
    """Tokenize a prompt and its reply as one text, without special tokens.

    Returns:
        The tokens, and how many of them are the prompt's.

    Raises:
        ValueError: The tokenizer does not say which characters a token covers, and joins some across the boundary.
    """
    text = prompt + reply
    tokens, spans = _tokenize_spans(tokenizer, text, [(len(prompt), len(text))])
    return tokens, spans[0][0] if spans else len(tokens)


def check_messages(messages: Any) -> None:
    """Raise a ValueError for what templates would render as if it were a conversation (``None`` for no text, ...)."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'a conversation must be a list of messages, not {messages!r:.80}')
    for index, message in enumerate(messages):
        values = message if isinstance(message, Mapping) else {}
        # A turn that only calls tools has no text.
        has_content = isinstance(values.get('content'), str) or values.get('tool_calls')
        if not isinstance(values.get('role'), str) or not has_content:
            raise ValueError(f'message {index} must have a text as its role and one as its content')


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    conversation: Any = list(messages)
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)
    assert isinstance(rendered, str)
    return rendered


def _tokenize_spans(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span],
) -> tuple[list[int], list[Span]]:
    if not tokenizer.is_fast:
        return _tokenize_pieces(tokenizer, text, spans)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token that straddles a boundary belongs to the side of its last character.
    ends = [end for _, end in encoded['offset_mapping']]
    mask = [any(start < end <= stop for start, stop in spans) for end in ends]
    return list(encoded['input_ids']), _runs(mask)


def _tokenize_pieces(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span],
) -> tuple[list[int], list[Span]]:
    """For tokenizers that do not say which characters a token covers: tokenize between the boundaries."""
    tokens: list[int] = []
    token_spans = []
    position = 0
    for start, stop in spans:
        tokens += _encode(tokenizer, text[position:start])
        first = len(tokens)
        tokens += _encode(tokenizer, text[start:stop])
        token_spans.append((first, len(tokens)))
        position = stop
    tokens += _encode(tokenizer, text[position:])
    if tokens != _encode(tokenizer, text):
        raise ValueError(
            f'{type(tokenizer).__name__} joins tokens across the turns of a conversation; use its fast variant.',
        )
    return tokens, token_spans


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    return encoded['input_ids']


def _runs(mask: Sequence[bool]) -> list[Span]:
    """The half-open ranges where ``mask`` is True."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=False))
