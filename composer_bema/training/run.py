# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A training run from its settings: build everything they name, fit, and report."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from composer.models import HuggingFaceModel
from composer.trainer import Trainer
from composer.utils import dist, format_name_with_dist, get_device, reproducibility
from composer.utils.file_helpers import is_uri
from torch.distributed.checkpoint.api import CheckpointException

from composer_bema.algorithms.weight_averaging import averages_among
from composer_bema.formats.completeness import newest_complete_checkpoint, saved_checkpoints
from composer_bema.training.checks import build_named, check_config, device_batch_size
from composer_bema.training.config import ConfigError, TrainConfig
from composer_bema.training.data.packing import check_packing
from composer_bema.training.data.sections import build_evaluators, build_loader, eval_sections
from composer_bema.training.outputs import (
    METRICS_FILE,
    MetricsFile,
    by_dotted_keys,
    check_run_folder,
    goes_on,
    is_below,
    report,
    write_settings,
)
from composer_bema.training.registry import build, find_builder, split_name
from composer_bema.training.tokenizers import build_tokenizer

__all__ = ['build_trainer', 'train']

log = logging.getLogger(__name__)

# Settings that the Trainer takes as they are, under the same name.
TRAINER_SETTINGS = (
    'run_name',
    'max_duration',
    'seed',
    'eval_interval',
    'eval_subset_num_batches',
    'device_train_microbatch_size',
    'accumulate_train_batch_on_tokens',
    'compile_config',
    'dist_timeout',
    'save_folder',
    'save_interval',
    'save_num_checkpoints_to_keep',
    'save_overwrite',
    'save_weights_only',
    'load_path',
    'load_weights_only',
    'autoresume',
    'progress_bar',
    'log_to_console',
    'console_log_interval',
    'python_log_level',
)


def build_trainer(config: TrainConfig) -> Trainer:
    """Check the settings and build what they name, down to the Trainer; nothing is trained yet.

    Raises:
        ConfigError: A setting, or a file that it names, is wrong.
    """
    check_config(config)
    device = get_device(None)
    dist.initialize_dist(device, timeout=config.dist_timeout)
    # Before the model, so that fresh weights depend on the seed too.
    reproducibility.seed_all(config.seed)
    tokenizer = build_tokenizer(config.tokenizer)
    batch_size = device_batch_size(config)
    train_loader = build_loader(config.train_loader, 'train_loader', tokenizer, config.max_seq_len, batch_size)
    eval_batch_size = config.device_eval_batch_size or batch_size
    evaluators = build_evaluators(config.eval_loader, tokenizer, config.max_seq_len, eval_batch_size)
    model = _build_section(config, 'model', tokenizer=tokenizer)
    _check_packing(config, model)
    folder = check_run_folder(config)
    settings = {name: getattr(config, name) for name in TRAINER_SETTINGS} | _resume_settings(config)
    if not evaluators:
        # Composer warns about an interval of evaluations when there is nothing to evaluate.
        settings |= {'eval_interval': 1, 'eval_subset_num_batches': -1}
    arguments = {
        'model': model,
        'train_dataloader': train_loader,
        'eval_dataloader': evaluators or None,
        'optimizers': _build_section(config, 'optimizer', params=[p for p in model.parameters() if p.requires_grad]),
        'schedulers': _build_section(config, 'scheduler'),
        'algorithms': build_named('algorithms', config.algorithms),
        'callbacks': build_named('callbacks', config.callbacks),
        'loggers': [MetricsFile(folder / METRICS_FILE, goes_on(config)), *build_named('loggers', config.loggers)],
        # An empty table is FSDP with Composer's defaults.
        'parallelism_config': None if config.fsdp_config is None else {'fsdp': config.fsdp_config},
        'device': device,
        'precision': config.precision or ('amp_bf16' if torch.cuda.is_available() else 'fp32'),
    }
    trainer = _make_trainer(config, {**arguments, **settings})
    if config.save_overwrite and not goes_on(config):
        _remove_earlier_checkpoints(config)
    write_settings(config, folder)
    return trainer


def _remove_earlier_checkpoints(config: TrainConfig) -> None:
    """Remove those of the run that is replaced: Composer replaces those of the same steps, and the others would mix.

    A folder that is not in the run's own may be another's, and one that the run starts from is not to be replaced.
    """
    if config.save_folder is None or is_uri(config.save_folder) or dist.get_global_rank() != 0:
        return
    folder = Path(format_name_with_dist(config.save_folder, str(config.run_name)))
    is_source = config.load_path is not None and is_below(config.load_path, folder)
    if is_below(folder, str(config.run_folder)) and not is_source:
        for _, _, path in saved_checkpoints(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _resume_settings(config: TrainConfig) -> dict[str, Any]:
    """The Trainer's settings that change where there is a checkpoint to resume from.

    What Composer's own ``autoresume`` would follow is a link, which after a kill leads nowhere or to part of a
    checkpoint. It is left to look where this does not: at a remote folder, and for a file of another name.
    """
    if not config.autoresume or is_uri(str(config.save_folder)):
        return {}
    found: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        save_folder = format_name_with_dist(str(config.save_folder), str(config.run_name))
        found = [newest_complete_checkpoint(save_folder, set_aside=True)]
    dist.broadcast_object_list(found)
    if found[0] is None:
        return {}
    log.info("Resuming from '%s'.", found[0])
    return {'load_path': found[0], 'load_weights_only': False, 'autoresume': False}


def _make_trainer(config: TrainConfig, arguments: dict[str, Any]) -> Trainer:
    try:
        return Trainer(**arguments)
    except (ValueError, TypeError, OSError):
        raise
    except (Exception, CheckpointException) as error:
        # Of a file that is no checkpoint, or another model's, torch makes RuntimeError, KeyError, EOFError and others,
        # and of a folder of shards an error that is no Exception, with the tracebacks of all ranks.
        if isinstance(error, CheckpointException):
            error, _ = next(iter(error.failures.values()))
        reason = f'{type(error).__name__}: {" ".join(str(error).split())}'.removesuffix(': ')
        source = arguments['load_path'] or (config.autoresume and config.save_folder)
        what = f"The checkpoint in '{source}' cannot be loaded into this run" if source else 'The run cannot be set up'
        raise ConfigError(f'{what} ({reason})') from error


def train(config: TrainConfig) -> str:
    """Train as the settings say; return a table of the last evaluation and where the run's files are (rank 0)."""
    trainer = build_trainer(config)
    try:
        trainer.logger.log_hyperparameters(by_dotted_keys(dataclasses.asdict(config)))
        if config.eval_first and trainer.state.timestamp.batch == 0:
            trainer.eval()
        elapsed = trainer.state.get_elapsed_duration()
        assert elapsed is not None, 'max_duration is required'
        # A run that is started again after its end has nothing left to do but report.
        if not (config.autoresume and elapsed >= 1):
            trainer.fit()
    finally:
        trainer.close()
    return report(str(config.run_folder), _averages_seen(trainer)) if dist.get_global_rank() == 0 else ''


def _averages_seen(trainer: Trainer) -> dict[str, str]:
    """The average that each evaluator sees by now, by its label: before its first update it is not there."""
    return {
        evaluator.label: type(average).__name__
        for average in averages_among(trainer.state.algorithms)
        for evaluator in trainer.state.evaluators
        if average.average.num_updates and (average.eval_labels is None or evaluator.label in average.eval_labels)
    }


def _check_packing(config: TrainConfig, model: HuggingFaceModel) -> None:
    sections = [('train_loader', config.train_loader), *eval_sections(config.eval_loader).values()]
    packed = next((path for path, section in sections if section['dataset'].get('packing')), None)
    if packed is not None:
        check_packing(model.model, f'{packed}.dataset.packing')


def _build_section(config: TrainConfig, kind: str, **supplied: Any) -> Any:
    name, arguments = split_name(getattr(config, kind), kind)
    return build(find_builder(kind, name, f'{kind}.name'), arguments, kind, **supplied)
