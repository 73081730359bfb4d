# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a run of a YAML would cost, told before anything is built: its architecture and its tokens."""

from composer.core import Time, TimeUnit

from composer_bema.flops import Architecture, architecture_of
from composer_bema.training.config import TrainConfig
from composer_bema.training.models import build_hf_config
from composer_bema.training.registry import argument_names
from composer_bema.training.tokenizers import build_tokenizer

__all__ = ['architecture_of_run', 'sequence_length_of_run', 'tokens_of_run']

# Their rows have no fixed length.
PADDED_LOADERS = ('finetuning', 'preference', 'toy_preferences')


def architecture_of_run(config: TrainConfig) -> Architecture:
    """The architecture that the ``model`` section names; its configuration is downloaded where it lies on the hub.

    Raises:
        ConfigError: The model cannot be found, or the section has a mistake.
        ValueError: Its FLOPs cannot be told.
    """
    names = argument_names(build_hf_config, ['count_vocabulary'])
    arguments = {name: value for name, value in config.model.items() if name in names}
    return architecture_of(build_hf_config(lambda: len(build_tokenizer(config.tokenizer)), **arguments))


def sequence_length_of_run(config: TrainConfig) -> int:
    """Tokens in a row of the training data, as far as they fill it."""
    return config.train_loader['dataset'].get('max_seq_len', config.max_seq_len)


def tokens_of_run(config: TrainConfig) -> int | None:
    """The tokens of training, in full rows; None where only the data could tell (epochs, padded rows)."""
    duration = Time.from_input(config.max_duration, 'ep')
    if duration.unit == TimeUnit.TOKEN:
        return duration.value
    samples = {TimeUnit.SAMPLE: duration.value, TimeUnit.BATCH: duration.value * config.global_train_batch_size}
    if duration.unit not in samples or config.train_loader['name'] in PADDED_LOADERS:
        return None
    return samples[duration.unit] * sequence_length_of_run(config)
