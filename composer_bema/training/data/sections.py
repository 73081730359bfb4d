# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The ``train_loader`` and ``eval_loader`` sections of a YAML: what they may hold, and the loaders that they name."""

import json
from collections.abc import Mapping
from typing import Any

from composer.core import DataSpec, Evaluator
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError, reject_unknown
from composer_bema.training.data.loaders import build_data_spec
from composer_bema.training.registry import argument_names, build, check_arguments, find_builder, split_name

__all__ = ['build_evaluators', 'build_loader', 'check_loader', 'eval_sections']

# What a loader's builder gets from the run rather than from the YAML.
CONTEXT = ('tokenizer', 'device_batch_size')


def eval_sections(eval_loader: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each evaluator's label with the dotted key and the contents of its section.

    Args:
        eval_loader: None, one loader (labelled ``eval`` unless it says otherwise), or a list of loaders with labels.
    """
    is_list = isinstance(eval_loader, list)
    sections = eval_loader if is_list else [eval_loader] if eval_loader else []
    labelled = {}
    for index, section in enumerate(sections):
        path = f'eval_loader.{index}' if is_list else 'eval_loader'
        if not isinstance(section, Mapping):
            raise ConfigError(f'{path} must hold `key: value` pairs, not {section!r}.')
        label = section.get('label', None if is_list else 'eval')
        if not label:
            raise ConfigError(f'{path}.label is missing from the settings.')
        if label == 'train':
            raise ConfigError(f"{path}.label: 'train' is how Composer calls the training batches; choose another.")
        if label in labelled:
            raise ConfigError(f"{path}.label: '{label}' is the label of another evaluator already.")
        labelled[str(label)] = path, {key: value for key, value in section.items() if key != 'label'}
    return labelled


def check_loader(section: Mapping[str, Any], path: str, max_seq_len: int) -> None:
    """Check the keys of one loader's section without reading any data."""
    name, arguments = split_name(section, path)
    builder = find_builder('loader', name, f'{path}.name')
    dataset = arguments.pop('dataset', None)
    if not isinstance(dataset, Mapping):
        raise ConfigError(f'{path}.dataset must hold the `key: value` pairs of loader {name}.')
    check_arguments(builder, {'max_seq_len': max_seq_len, **dataset}, f'{path}.dataset', CONTEXT)
    supplied = ('source', 'batch_size')
    reject_unknown(arguments, [*argument_names(build_data_spec, supplied), 'dataset', 'name'], path)
    check_arguments(build_data_spec, arguments, path, supplied)


def build_loader(
    section: Mapping[str, Any],
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    batch_size: int,
) -> DataSpec:
    """Build the loader that a section names.

    Args:
        section: ``name``, ``dataset`` and the options of :func:`.build_data_spec`.
        path: The section's dotted key.
        tokenizer: Makes the tokens.
        max_seq_len: For a ``dataset`` that names none, in tokens.
        batch_size: Samples in a batch of one device.
    """
    check_loader(section, path, max_seq_len)
    name, options = split_name(section, path)
    dataset = {'max_seq_len': max_seq_len, **options.pop('dataset')}
    builder = find_builder('loader', name, f'{path}.name')
    context = {'tokenizer': tokenizer, 'device_batch_size': batch_size}
    context = {key: value for key, value in context.items() if key in argument_names(builder)}
    try:
        source = build(builder, dataset, f'{path}.dataset', **context)
    except ConfigError as error:
        # Builders speak of their own arguments; the reader of the message needs to know whose.
        raise error if str(error).startswith(path) else ConfigError(f'{path}.dataset: {error}') from error
    return build(build_data_spec, options, path, source=source, batch_size=batch_size)


def build_evaluators(
    eval_loader: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    batch_size: int,
) -> list[Evaluator]:
    """One Evaluator for each label; those that differ in nothing but their label share a loader."""
    loaders: dict[str, DataSpec] = {}
    evaluators = []
    for label, (path, section) in eval_sections(eval_loader).items():
        key = json.dumps(section, sort_keys=True)
        if key not in loaders:
            loaders[key] = build_loader(section, path, tokenizer, max_seq_len, batch_size)
        evaluators.append(Evaluator(label=label, dataloader=loaders[key]))
    return evaluators
