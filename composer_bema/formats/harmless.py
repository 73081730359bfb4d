# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What files may say only where we allow it: the names of other files, and of code that is to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

__all__ = ['is_file_name', 'leads_below', 'names_model', 'refuse_named_code', 'refuse_named_model']

# Where transformers looks for an implementation of attention. One with a slash is a repository of the hub, whose code
# runs as soon as a model is made of the configuration.
_ATTENTION = ('attn_implementation', '_attn_implementation', '_attn_implementation_internal')
# With these PEFT loads a tokenizer under settings of its own, or imports a module, while it makes an adapter.
_OF_PEFT = ('tokenizer_kwargs', 'megatron_config')
# The library whose modules PEFT may be told to import for the class of a base model.
_TRANSFORMERS = 'transformers'
# With this a part of the model would be allowed to run its code.
_TRUST = 'trust_remote_code'
# Other names for settings, behind which these would not be seen here. Classes have it, and saved configurations do not.
_ALIASES = 'attribute_map'
# What models of images have loaded from elsewhere while they are made: a part of transformers or timm, by its name.
_PARTS = ('backbone', 'backbone_kwargs', 'model_args')


def is_file_name(name: Any) -> bool:
    """Returns whether this is the name of a file in a folder, and not of one elsewhere."""
    return isinstance(name, str) and name not in ('', '.', '..') and not {'/', '\0'} & {*name}


def leads_below(path: str) -> bool:
    """Returns whether a path, taken from a folder, leads to something in it, as far as its words tell."""
    parts = PurePath(path).parts
    return bool(parts) and not PurePath(path).is_absolute() and '..' not in parts and '\0' not in path


def refuse_named_code(config: Mapping[str, Any], source: str) -> None:
    """Checks that the configuration of a model or an adapter has no code loaded while one is made of it.

    Args:
        config (Mapping[str, Any]): The configuration, with those that it holds.
        source (str): Where it comes from, for the message.

    Raises:
        ValueError: If it names code, or could do so unseen.
    """
    for key, value in _entries(config):
        is_kernel = key in _ATTENTION and '/' in str(value)
        library = value.get('parent_library') if key == 'auto_mapping' and isinstance(value, Mapping) else None
        is_foreign = library is not None and str(library).partition('.')[0] != _TRANSFORMERS
        if is_kernel or is_foreign or (key in (*_OF_PEFT, _TRUST) and value):
            raise ValueError(f"The configuration in '{source}' has code loaded ({key}: {value}): remove it from there.")
        if key == _ALIASES:
            raise ValueError(
                f"The configuration in '{source}' has other names for its settings ({key}: {value}): remove them, and "
                'use the names of transformers.'
            )


def names_model(config: Mapping[str, Any]) -> bool:
    """Returns whether a model of this configuration has another one loaded by its name while it is made."""
    return next(_named_models(config), None) is not None


def refuse_named_model(config: Mapping[str, Any], source: str) -> None:
    """Checks that a model can be made of a configuration without another one, from elsewhere.

    Args:
        config (Mapping[str, Any]): The configuration, with those that it holds.
        source (str): Where it comes from, for the message.

    Raises:
        ValueError: If it names one.
    """
    for key, value in _named_models(config):
        raise ValueError(
            f"The configuration in '{source}' has another model loaded ({key}: {value}): have its own configuration "
            'there (backbone_config), or use another model.'
        )


def _named_models(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in _entries(config) if key in _PARTS and value)


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key), value
            yield from _entries(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _entries(value)
