# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Everything about a run's settings that can be checked before anything is built or downloaded."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from composer.core import Precision, Time
from composer.utils import FSDP2Config, FSDPConfig, dist
from torch.distributed.fsdp import ShardingStrategy

from composer_bema.algorithms.coexistence import check_algorithms
from composer_bema.algorithms.weight_averaging import averages_among
from composer_bema.formats.harmless import leads_below
from composer_bema.training.config import ConfigError, TrainConfig, reject_unknown, suggest
from composer_bema.training.data.sections import check_loader, eval_sections
from composer_bema.training.registry import ON_PAIRS, build, check_arguments, find_builder, split_name
from composer_bema.training.tokenizers import check_tokenizer

__all__ = ['build_named', 'check_config', 'check_time', 'device_batch_size']

TIMES = ('max_duration', 'eval_interval', 'save_interval', 'console_log_interval')
LOG_LEVELS = ['CRITICAL', 'ERROR', 'WARNING', 'INFO', 'DEBUG']


def check_config(config: TrainConfig) -> None:
    """Check names, keys, times and sizes, and how they fit together.

    Raises:
        ConfigError: One sentence about the first mistake, with its dotted key.
    """
    for key in TIMES:
        check_time(getattr(config, key), key)
    _check_sizes(config)
    check_tokenizer(config.tokenizer)
    for kind, supplied in (('model', 'tokenizer'), ('optimizer', 'params')):
        name, arguments = split_name(getattr(config, kind), kind)
        check_arguments(find_builder(kind, name, f'{kind}.name'), arguments, kind, [supplied])
    # Schedulers and algorithms check their values themselves, and building one changes nothing.
    name, arguments = split_name(config.scheduler, 'scheduler')
    build(find_builder('scheduler', name, 'scheduler.name'), arguments, 'scheduler')
    check_loader(config.train_loader, 'train_loader', config.max_seq_len)
    for path, section in eval_sections(config.eval_loader).values():
        check_loader(section, path, config.max_seq_len)
    _check_pairs(config)
    for kind in ('callbacks', 'loggers'):
        for name, arguments in (getattr(config, kind) or {}).items():
            check_arguments(find_builder(kind, name, kind), arguments or {}, f'{kind}.{name}')
    algorithms = build_named('algorithms', config.algorithms)
    try:
        check_algorithms(averages_among(algorithms), algorithms)
    except ValueError as error:
        raise ConfigError(f'algorithms: {error}') from error
    _check_eval_labels(config)
    if not leads_below(str(config.run_name)):
        raise ConfigError(
            f"run_name: '{config.run_name}' leads out of the folder of runs; name another folder with run_folder."
        )
    _check_choice(config.precision, [precision.value for precision in Precision], 'precision')
    _check_choice((config.python_log_level or 'info').upper(), LOG_LEVELS, 'python_log_level')
    _check_fsdp(config.fsdp_config or {})
    if config.autoresume and config.save_folder is None:
        raise ConfigError('autoresume needs save_folder, where it looks for the last checkpoint.')
    if config.autoresume and config.save_weights_only:
        raise ConfigError('autoresume needs more than save_weights_only=true saves: set one of them to false.')


def device_batch_size(config: TrainConfig) -> int:
    """One device's share of ``global_train_batch_size``, in sequences."""
    devices = dist.get_world_size()
    share, rest = divmod(config.global_train_batch_size, devices)
    if rest or share < 1:
        raise ConfigError(
            f'global_train_batch_size must be a positive multiple of the number of devices ({devices}), '
            f'not {config.global_train_batch_size}.',
        )
    return share


def _check_sizes(config: TrainConfig) -> None:
    device_batch_size(config)
    for key, also in (('device_train_microbatch_size', 'auto'), ('device_eval_batch_size', None)):
        size = getattr(config, key)
        if size not in (None, also) and not (isinstance(size, int) and size > 0):
            choice = f" or '{also}'" if also else ''
            raise ConfigError(f'{key} must be a positive number of sequences{choice}, not {size!r}.')
    batches = config.eval_subset_num_batches
    if batches < 1 and batches != -1:
        raise ConfigError(f'eval_subset_num_batches must be a positive number of batches or -1 (all), not {batches}.')
    if Time.from_input(config.max_duration, 'ep').value <= 0:
        raise ConfigError(f"max_duration must be positive, not '{config.max_duration}'.")


def build_named(kind: str, sections: Mapping[str, Any] | None) -> list[Any]:
    """Build the members of a section of the form ``{name: arguments}`` (``algorithms``, ``callbacks``, ``loggers``)."""
    return [
        build(find_builder(kind, name, kind), arguments or {}, f'{kind}.{name}')
        for name, arguments in (sections or {}).items()
    ]


def _check_pairs(config: TrainConfig) -> None:
    model = config.model['name']
    sections = [('train_loader', config.train_loader), *eval_sections(config.eval_loader).values()]
    for path, loader in ((path, section['name']) for path, section in sections):
        if model in ON_PAIRS['model'] and loader not in ON_PAIRS['loader']:
            raise ConfigError(
                f'{path}.name: {model} needs preference pairs, which {loader} does not make; use '
                f'{" or ".join(ON_PAIRS["loader"])}.',
            )
        if loader in ON_PAIRS['loader'] and model not in ON_PAIRS['model']:
            raise ConfigError(
                f'{path}.name: {loader} makes preference pairs, which {model} does not train on; use the model '
                f'{" or ".join(ON_PAIRS["model"])}.',
            )


def _check_fsdp(settings: Mapping[str, Any]) -> None:
    # Composer reads this variable when it builds the Trainer, and ignores keys of the other version with a warning.
    if os.environ.get('FSDP_VERSION', '1') == '2':
        reject_unknown(settings, FSDP2Config.settable_attrs(), 'fsdp_config')
        if settings.get('load_monolith_rank0_only'):
            raise ConfigError(
                'fsdp_config.load_monolith_rank0_only: with FSDP2 the other ranks would keep the weights that they '
                'were built with; leave it out.',
            )
        return
    reject_unknown(settings, [field.name for field in dataclasses.fields(FSDPConfig) if field.init], 'fsdp_config')
    strategy = settings.get('sharding_strategy')
    _check_choice(strategy, list(ShardingStrategy.__members__), 'fsdp_config.sharding_strategy')


def check_time(value: Any, path: str) -> None:
    """Check that a setting, under the dotted ``path``, is one of Composer's times.

    Raises:
        ConfigError: It is none.
    """
    try:
        Time.from_input(value, 'ep')
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: '{value}' is not a Composer time such as '100ba', '1ep' or '1000000tok'."
        ) from error


def _check_choice(value: str | None, known: list[str], path: str) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{path}: '{value}' is not one of {', '.join(known)}.")


def _check_eval_labels(config: TrainConfig) -> None:
    labels = eval_sections(config.eval_loader)
    for name, arguments in (config.algorithms or {}).items():
        wanted = (arguments or {}).get('eval_labels') or []
        for label in [wanted] if isinstance(wanted, str) else wanted:
            if label not in labels:
                raise ConfigError(
                    f"algorithms.{name}.eval_labels: no evaluator is labelled '{label}'{suggest(label, labels)}.",
                )
