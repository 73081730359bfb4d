# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tokenizers: plain bytes without a download, or any tokenizer by its Hugging Face name or folder."""

from collections.abc import Mapping
from typing import Any, Optional

from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from composer_bema.formats.foreign_code import ForeignCodeError, no_foreign_code
from composer_bema.training.config import ConfigError, reject_unknown
from composer_bema.training.registry import REGISTRY, build, find_builder, split_name

__all__ = ['build_byte_tokenizer', 'build_tokenizer', 'check_tokenizer']


def build_byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """One token a UTF-8 byte (byte + 3), after pad 0, end of text 1 and unknown 2: a vocabulary of 259.

    Args:
        chat_template: A Jinja template for conversations; None: there are none.
    """
    return ByT5Tokenizer(extra_ids=0, chat_template=chat_template)


def check_tokenizer(section: Mapping[str, Any]) -> None:
    """Check the ``tokenizer`` section (``name``, ``kwargs``) without building anything."""
    _, arguments = split_name(section, 'tokenizer')
    reject_unknown(arguments, ['name', 'kwargs'], 'tokenizer')
    if not isinstance(arguments.get('kwargs') or {}, Mapping):
        raise ConfigError(f'tokenizer.kwargs must be a mapping, not {arguments["kwargs"]!r}.')


def build_tokenizer(section: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Build what the ``tokenizer`` section names; a tokenizer without a padding token pads with its end of text.

    Raises:
        ConfigError: The section is wrong, or no such tokenizer can be loaded.
    """
    check_tokenizer(section)
    name, arguments = split_name(section, 'tokenizer')
    kwargs: Optional[Mapping[str, Any]] = arguments.get('kwargs')
    if name in REGISTRY['tokenizer']:
        tokenizer = build(find_builder('tokenizer', name, 'tokenizer.name'), kwargs or {}, 'tokenizer.kwargs')
    else:
        tokenizer = _load_pretrained(name, kwargs or {})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_pretrained(name: str, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    kwargs = {'trust_remote_code': False, **kwargs}
    try:
        with no_foreign_code(name, is_trusted=kwargs['trust_remote_code']):
            return AutoTokenizer.from_pretrained(name, **kwargs)
    except ForeignCodeError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer.name: '{name}' is none of our tokenizers ({', '.join(REGISTRY['tokenizer'])}), "
            'no folder with a tokenizer here, and could not be downloaded.',
        ) from error
