# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Which names a YAML may use for models, tokenizers, loaders, optimizers, ... and what each of them builds.

A builder is a class or a function, written as ``module:attribute`` so that nothing is imported before it is named. A
section of the YAML holds its keyword arguments, which are checked against its signature: its docstring explains them.
"""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.optim.optimizer import required

from composer_bema.training.config import ConfigError, reject_unknown, suggest
from composer_bema.training.values import argument_types, describe, fits

__all__ = ['ON_PAIRS', 'REGISTRY', 'argument_names', 'build', 'check_arguments', 'find_builder', 'split_name']

REGISTRY: dict[str, dict[str, str]] = {
    'model': {
        'hf_causal_lm': 'composer_bema.training.models:build_hf_causal_lm',
        'hf_causal_lm_dpo': 'composer_bema.training.models:build_hf_causal_lm_dpo',
    },
    # Any other tokenizer name is a Hugging Face name or folder.
    'tokenizer': {'bytes': 'composer_bema.training.tokenizers:build_byte_tokenizer'},
    'loader': {
        'python_manual': 'composer_bema.training.data.python_manual:build_python_manual',
        'text_files': 'composer_bema.training.data.text_files:build_text_files',
        'text': 'composer_bema.training.data.streaming:build_streaming_text',
        'finetuning': 'composer_bema.training.data.finetuning:build_finetuning',
        'preference': 'composer_bema.training.data.preference:build_preference',
        'toy_preferences': 'composer_bema.training.data.toy_preferences:build_toy_preferences',
    },
    'optimizer': {
        'decoupled_adamw': 'composer.optim:DecoupledAdamW',
        'decoupled_sgdw': 'composer.optim:DecoupledSGDW',
        'adamw': 'torch.optim:AdamW',
        'sgd': 'torch.optim:SGD',
    },
    'scheduler': {
        'constant': 'composer.optim:ConstantScheduler',
        'constant_with_warmup': 'composer.optim:ConstantWithWarmupScheduler',
        'cosine': 'composer.optim:CosineAnnealingScheduler',
        'cosine_with_constant_tail': 'composer_bema.lr_schedulers:CosineAnnealingWithConstantTailScheduler',
        'cosine_with_warmup': 'composer.optim:CosineAnnealingWithWarmupScheduler',
        'cosine_warm_restarts': 'composer.optim:CosineAnnealingWarmRestartsScheduler',
        'exponential': 'composer.optim:ExponentialScheduler',
        'linear_decay': 'composer.optim:LinearScheduler',
        'linear_decay_with_warmup': 'composer.optim:LinearWithWarmupScheduler',
        'multistep': 'composer.optim:MultiStepScheduler',
        'multistep_with_warmup': 'composer.optim:MultiStepWithWarmupScheduler',
        'polynomial': 'composer.optim:PolynomialScheduler',
        'polynomial_with_warmup': 'composer.optim:PolynomialWithWarmupScheduler',
        'step': 'composer.optim:StepScheduler',
        'warmup_stable_decay': 'composer_bema.lr_schedulers:WarmupStableDecayScheduler',
    },
    'algorithms': {
        'bema': 'composer_bema.algorithms:BEMA',
        'dema': 'composer_bema.algorithms:DEMA',
        'ema': 'composer_bema.algorithms:EMA',
        'lawa': 'composer_bema.algorithms:LAWA',
        'ouema': 'composer_bema.algorithms:OUEMA',
        'swa_window': 'composer_bema.algorithms:SWAWindow',
        'gradient_clipping': 'composer.algorithms:GradientClipping',
        'low_precision_layernorm': 'composer.algorithms:LowPrecisionLayerNorm',
    },
    'callbacks': {
        'activation_monitor': 'composer.callbacks:ActivationMonitor',
        'early_stopper': 'composer.callbacks:EarlyStopper',
        'flops_monitor': 'composer_bema.training.callbacks:FlopsMonitor',
        'hf_checkpointer': 'composer_bema.training.callbacks:HuggingFaceCheckpointer',
        'lr_monitor': 'composer.callbacks:LRMonitor',
        'memory_monitor': 'composer.callbacks:MemoryMonitor',
        'memory_snapshot': 'composer.callbacks:MemorySnapshot',
        'nan_monitor': 'composer.callbacks:NaNMonitor',
        'oom_observer': 'composer.callbacks:OOMObserver',
        'optimizer_monitor': 'composer.callbacks:OptimizerMonitor',
        'runtime_estimator': 'composer.callbacks:RuntimeEstimator',
        'speed_monitor': 'composer.callbacks:SpeedMonitor',
        'system_metrics_monitor': 'composer.callbacks:SystemMetricsMonitor',
    },
    'loggers': {
        'cometml': 'composer.loggers:CometMLLogger',
        'file_logger': 'composer.loggers:FileLogger',
        'inmemory': 'composer.loggers:InMemoryLogger',
        'mlflow': 'composer.loggers:MLFlowLogger',
        'neptune': 'composer.loggers:NeptuneLogger',
        'remote_uploader_downloader': 'composer.loggers:RemoteUploaderDownloader',
        'tensorboard': 'composer.loggers:TensorboardLogger',
        'wandb': 'composer.loggers:WandBLogger',
    },
}

# The models that train on pairs of completions, and the loaders that make them.
ON_PAIRS = {'model': ['hf_causal_lm_dpo'], 'loader': ['preference', 'toy_preferences']}


def find_builder(kind: str, name: str, path: str) -> Callable[..., Any]:
    """The builder registered for ``name``; ``path`` is where the YAML says so, for the error message."""
    names = REGISTRY[kind]
    if name not in names:
        raise ConfigError(f"{path}: there is no {kind.rstrip('s')} named '{name}'{suggest(str(name), names)}.")
    module, _, attribute = names[name].partition(':')
    return getattr(importlib.import_module(module), attribute)


def split_name(section: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """Split ``{name: ..., **arguments}`` into the name and the arguments."""
    if not isinstance(section, Mapping):
        raise ConfigError(f'{path} must be a mapping with a `name`, not {section!r}.')
    if not section.get('name'):
        raise ConfigError(f'{path}.name is missing from the settings.')
    return str(section['name']), {key: value for key, value in section.items() if key != 'name'}


def argument_names(builder: Callable[..., Any], supplied: Collection[str] = ()) -> list[str]:
    """The keyword arguments of ``builder``, in the order of its signature, without those in ``supplied``."""
    parameters = inspect.signature(builder).parameters.values()
    return [p.name for p in parameters if p.name not in supplied and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def check_arguments(
    builder: Callable[..., Any],
    arguments: Mapping[str, Any],
    path: str,
    supplied: Collection[str] = (),
) -> None:
    """Check that ``builder`` takes ``arguments``, misses none, and that their types are those that it asks for.

    Args:
        builder: What will be called.
        arguments: The keyword arguments that the YAML gives.
        path: The dotted key under which it gives them.
        supplied: Parameters that the caller fills in and the YAML must not.

    Raises:
        ConfigError: Names the full dotted key of the first argument that is unknown, missing or of a wrong type.
    """
    if not isinstance(arguments, Mapping):
        raise ConfigError(f'{path} must hold `key: value` pairs, not {arguments!r}.')
    parameters = inspect.signature(builder).parameters
    names = argument_names(builder, supplied)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        reject_unknown(arguments, names, path)
    for name in names:
        # The required learning rate of Composer's optimizers has a sentinel for a default.
        if parameters[name].default in (inspect.Parameter.empty, required) and name not in arguments:
            raise ConfigError(f'{path}.{name} is missing from the settings.')
    for name, hint in argument_types(builder).items():
        # A default is fine whatever the annotation: `window: int = None` is common.
        if name in arguments and name in names and arguments[name] != parameters[name].default:
            _check_type(arguments[name], hint, f'{path}.{name}')


def _check_type(value: Any, hint: Any, path: str) -> None:
    wanted = describe(hint)
    if wanted and not fits(value, hint):
        raise ConfigError(f'{path} must be {wanted}, not {value!r}.')


def build(builder: Callable[..., Any], arguments: Mapping[str, Any], path: str, **supplied: Any) -> Any:
    """Check ``arguments`` and call ``builder`` with them; its errors get ``path`` in front.

    Raises:
        ConfigError: An argument is unknown, missing or refused by the builder.
    """
    check_arguments(builder, arguments, path, supplied)
    try:
        return builder(**supplied, **arguments)
    except ConfigError:
        raise
    except Exception as error:
        # A model's, dataset's or logger's constructor raises what it likes about arguments that it cannot use.
        raise ConfigError(f'{path}: {" ".join(str(error).split()) or type(error).__name__}') from error
