# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""One row of preference data as tokens: what its columns may hold, and how a pair is tokenized and cut."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union

from transformers import PreTrainedTokenizerBase

from composer_bema.training.data.chat import check_messages, render_reply, tokenize_reply

__all__ = ['Completion', 'Pair', 'cut_pair', 'encode_pair', 'special_tokens', 'split_pair']

CHOSEN, REJECTED, PROMPT = 'chosen', 'rejected', 'prompt'

Messages = list[Mapping[str, Any]]


class Pair(NamedTuple):
    """Three texts, or three lists of messages."""

    prompt: Union[str, Messages]
    chosen: Union[str, Messages]
    rejected: Union[str, Messages]

    @property
    def has_blank_side(self) -> bool:
        """Whether a completion says nothing, though its end could be learned."""
        return _is_blank(self.chosen) or _is_blank(self.rejected)


class Completion(NamedTuple):
    """A prompt with one of its two completions."""

    tokens: list[int]
    start: int
    """How many of the tokens are the prompt's."""

    @property
    def has_target(self) -> bool:
        # The first token of a row is never predicted.
        return len(self.tokens) > max(self.start, 1)


def split_pair(row: Mapping[str, Any]) -> Pair:
    """Find the prompt of a row and what each side says behind it.

    Raises:
        ValueError: The row has none of the forms that :func:`.build_preference` lists.
    """
    prompt, chosen, rejected = row.get(PROMPT), row[CHOSEN], row[REJECTED]
    if not (prompt is None or isinstance(prompt, (str, list))):
        raise ValueError(f'{PROMPT} must be a text or a list of messages, not {prompt!r:.80}')
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            return _split_chats(prompt, [_message('assistant', chosen)], [_message('assistant', rejected)])
        return _split_texts(chosen, rejected) if prompt is None else Pair(prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_chats(prompt, chosen, rejected)
    raise ValueError(f'{CHOSEN} and {REJECTED} must be two texts or two lists of messages')


def _is_blank(completion: Union[str, Messages]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any((message.get('content') or '').strip() or message.get('tool_calls') for message in completion)


def _message(role: str, content: str) -> Mapping[str, Any]:
    return {'role': role, 'content': content}


def _split_texts(chosen: str, rejected: str) -> Pair:
    """The prompt is the beginning that both share, in whole words; a completion keeps the space before its first."""
    end = _common_length(chosen, rejected)
    if any(side[end : end + 1].strip() for side in (chosen, rejected)):
        # A word begins or goes on here, so both completions get all of it.
        while end and not chosen[end - 1].isspace():
            end -= 1
        if chosen[end - 1 : end] == ' ':
            end -= 1
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def _split_chats(prompt: Union[str, Messages, None], chosen: Messages, rejected: Messages) -> Pair:
    check_messages(chosen)
    check_messages(rejected)
    if isinstance(prompt, list):
        check_messages(prompt)
        opening = prompt
    else:
        opening = chosen[: _common_length(chosen, rejected)]
        # A reply alone leaves the question to the prompt; a conversation has it already.
        if isinstance(prompt, str) and (not opening or opening[0]['role'] == 'assistant'):
            opening = [_message('user', prompt)]
    if not opening:
        raise ValueError(f'{CHOSEN} and {REJECTED} share no first message, and there is no {PROMPT}')
    chosen, rejected = (_behind(opening, messages) for messages in (chosen, rejected))
    for messages in (chosen, rejected):
        if messages and messages[0]['role'] != 'assistant':
            raise ValueError(f"what follows the prompt must be the assistant's, not the {messages[0]['role']}'s")
    return Pair(opening, chosen, rejected)


def _behind(opening: Messages, messages: Messages) -> Messages:
    """The messages without those of ``opening``, where they repeat it."""
    return messages[len(opening) :] if messages[: len(opening)] == opening else messages


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What goes in front of a plain text, and what ends it; at most one token each."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded: Any = tokenizer('a', verbose=False)
    # There are tokenizers that name such a token and do not use it.
    front: list[Any] = [bos] if bos is not None and encoded['input_ids'][:1] == [bos] else []
    end: list[Any] = [] if eos is None else [eos]
    return front, end


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    pair: Pair,
    front: list[int],
    end: list[int],
) -> tuple[Completion, Completion]:
    """Tokenize the prompt with the chosen completion and with the rejected one.

    Args:
        tokenizer: Renders messages with its chat template, which brings its own special tokens.
        pair: What to tokenize.
        front: What a plain text begins with.
        end: What a plain text ends with.

    Raises:
        ValueError: The prompt and a completion cannot be told apart.
    """
    encode = functools.partial(_encode, tokenizer, pair.prompt, front=front, end=end)
    return encode(pair.chosen), encode(pair.rejected)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Union[str, Messages],
    reply: Union[str, Messages],
    front: list[int],
    end: list[int],
) -> Completion:
    if isinstance(prompt, str):
        assert isinstance(reply, str), 'behind a text comes a text'
        return _encode_text(tokenizer, prompt, reply, front, end)
    assert not isinstance(reply, str), 'behind messages come messages'
    return _encode_chat(tokenizer, prompt, reply)


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str, front: list[int], end: list[int]
) -> Completion:
    tokens, start = tokenize_reply(tokenizer, prompt, reply)
    # A text may hold them already.
    front = [] if tokens[:1] == front else front
    end = [] if tokens[-1:] == end else end
    return Completion([*front, *tokens, *end], len(front) + start)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: Messages, reply: Messages) -> Completion:
    # Without a message there is no completion, and nothing to render.
    if not reply:
        return Completion([], 0)
    return Completion(*tokenize_reply(tokenizer, *render_reply(tokenizer, prompt, reply)))


def cut_pair(
    chosen: Completion, rejected: Completion, max_seq_len: int, max_prompt_len: int
) -> tuple[Completion, Completion]:
    """Cut a pair to ``max_seq_len`` tokens a side, the prompt at its beginning and the completions at their end.

    A pair that fits is left whole. Of another's prompt the last ``max_prompt_len`` tokens stay, or more where even the
    longer completion leaves room for them, so that both sides keep the same prompt.
    """
    pair = (chosen, rejected)
    if all(len(side.tokens) <= max_seq_len for side in pair):
        return pair
    longest = max(len(side.tokens) - side.start for side in pair)
    kept = max(max_prompt_len, max_seq_len - longest)
    return _cut(chosen, kept, max_seq_len), _cut(rejected, kept, max_seq_len)


def _cut(side: Completion, prompt_tokens: int, max_seq_len: int) -> Completion:
    dropped = max(side.start - prompt_tokens, 0)
    return Completion(side.tokens[dropped : dropped + max_seq_len], side.start - dropped)
