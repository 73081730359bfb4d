# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Causal language models of Hugging Face transformers as Composer models."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from composer.metrics import LanguageCrossEntropy, LanguagePerplexity
from composer.models import HuggingFaceModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from composer_bema.formats.foreign_code import ForeignCodeError, no_foreign_code
from composer_bema.formats.harmless import refuse_named_code, refuse_named_model
from composer_bema.preference.dpo import DPO
from composer_bema.preference.losses import LossType
from composer_bema.training.config import ConfigError, suggest

__all__ = ['build_hf_causal_lm', 'build_hf_causal_lm_dpo', 'build_hf_config']


def build_hf_causal_lm(
    tokenizer: PreTrainedTokenizerBase,
    pretrained_model_name_or_path: Optional[str] = None,
    pretrained: bool = True,
    config: Optional[Mapping[str, Any]] = None,
    config_overrides: Optional[Mapping[str, Any]] = None,
    attn_implementation: Optional[str] = None,
    trust_remote_code: bool = False,
    use_train_metrics: bool = True,
    peft_config: Optional[Mapping[str, Any]] = None,
) -> HuggingFaceModel:
    """Build a causal language model with fp32 weights; lower precision is ``precision``'s business.

    Args:
        tokenizer: Fixes the size of the vocabulary when ``config`` leaves it open.
        pretrained_model_name_or_path: A name on the Hugging Face hub or a local folder.
        pretrained: Load the weights too; False takes the configuration only and starts from fresh weights.
        config: A whole configuration (``model_type`` and the rest) in place of ``pretrained_model_name_or_path``, for
            fresh weights without any download.
        config_overrides: Values to change in the configuration.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``; None leaves the choice to transformers.
        trust_remote_code: Whether code that comes with the model may run, and kernels of the hub as
            ``attn_implementation``.
        use_train_metrics: Compute loss and perplexity as metrics of the training batches too.
        peft_config: LoRA settings for ``peft.LoraConfig``; only the adapters are trained then.

    Raises:
        ConfigError: Nothing, or both ways, says which model; or it cannot be found; or a configuration key is unknown.
    """
    hf_config = build_hf_config(
        lambda: len(tokenizer),
        pretrained_model_name_or_path,
        config,
        config_overrides,
        trust_remote_code,
    )
    # The cache only serves generation; here it would be built and thrown away at each step, and with one transformers
    # does not keep packed documents apart.
    hf_config.use_cache = False
    model = _make(
        hf_config,
        pretrained_model_name_or_path if pretrained else None,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    _check_vocabulary(model, tokenizer)
    # Composer asks these which modules to shard, and to checkpoint, as units.
    for attribute in ('fsdp_wrap_fn', 'activation_checkpointing_fn'):
        setattr(model, attribute, functools.partial(_is_block, block_names=_block_names(model)))
    metrics = [LanguageCrossEntropy(), LanguagePerplexity()]
    return HuggingFaceModel(
        model=model,
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        use_logits=True,
        metrics=metrics if use_train_metrics else [],
        eval_metrics=metrics,
        peft_config=_peft_config(peft_config),
    )


def build_hf_causal_lm_dpo(
    tokenizer: PreTrainedTokenizerBase,
    pretrained_model_name_or_path: Optional[str] = None,
    pretrained: bool = True,
    config: Optional[Mapping[str, Any]] = None,
    config_overrides: Optional[Mapping[str, Any]] = None,
    attn_implementation: Optional[str] = None,
    trust_remote_code: bool = False,
    use_train_metrics: bool = True,
    peft_config: Optional[Mapping[str, Any]] = None,
    beta: float = 0.1,
    loss_type: LossType = 'sigmoid',
    label_smoothing: float = 0.0,
) -> DPO:
    """Build a policy and its frozen reference, which begin as the same causal language model.

    Args:
        tokenizer: This and the arguments down to ``peft_config`` are those of :func:`build_hf_causal_lm`. With a
            ``peft_config`` policy and reference are two adapters on one base.
        pretrained_model_name_or_path: As there.
        pretrained: As there.
        config: As there.
        config_overrides: As there.
        attn_implementation: As there.
        trust_remote_code: As there.
        use_train_metrics: Compute rewards and the other metrics of :class:`.DPO` of the training batches too.
        peft_config: As there.
        beta: The strength of the pull towards the reference, above 0.
        loss_type: ``sigmoid`` or ``ipo``.
        label_smoothing: The share of pairs thought to be the wrong way round, below 0.5; with ``sigmoid`` only.
    """
    policy = build_hf_causal_lm(
        tokenizer,
        pretrained_model_name_or_path,
        pretrained,
        config,
        config_overrides,
        attn_implementation,
        trust_remote_code,
        peft_config=peft_config,
    )
    model: Any = policy.model
    return DPO(model, tokenizer, beta, loss_type, label_smoothing, use_train_metrics)


def build_hf_config(
    count_vocabulary: Callable[[], int],
    pretrained_model_name_or_path: Optional[str] = None,
    config: Optional[Mapping[str, Any]] = None,
    config_overrides: Optional[Mapping[str, Any]] = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Build the configuration of the model that :func:`build_hf_causal_lm` would build.

    Args:
        count_vocabulary: Tells the size of the vocabulary when ``config`` leaves it open.
        pretrained_model_name_or_path: This and the rest are the arguments of that function.
        config: This or the one above.
        config_overrides: Values to change in the configuration.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ConfigError: Nothing, or both ways, says which model; or it cannot be found; or a configuration key is unknown.
    """
    if (config is None) == (pretrained_model_name_or_path is None):
        raise ConfigError('model needs either pretrained_model_name_or_path or config, and not both.')
    if config is not None:
        hf_config = _config_from_mapping(config, count_vocabulary)
    else:
        hf_config = _load_config(str(pretrained_model_name_or_path), trust_remote_code)
    _override(hf_config, config_overrides or {})
    return hf_config


def _config_from_mapping(config: Mapping[str, Any], count_vocabulary: Callable[[], int]) -> PretrainedConfig:
    if 'model_type' not in config:
        raise ConfigError('model.config.model_type is missing from the settings.')
    values = dict(config) if 'vocab_size' in config else {'vocab_size': count_vocabulary(), **config}
    try:
        hf_config = AutoConfig.for_model(**values)
    except ValueError as error:
        raise ConfigError(f"model.config.model_type: transformers knows no '{config['model_type']}'.") from error
    defaults = type(hf_config)()
    for key in config:
        _check_key(defaults, key, f'model.config.{key}', extra=('model_type',))
    return hf_config


def _load_config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        written, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise _not_found(name) from error
    if not trust_remote_code:
        refuse_named_code(written, name)
        refuse_named_model(written, name)
        _refuse_adapter(name)
    try:
        with no_foreign_code(name, is_trusted=trust_remote_code):
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ForeignCodeError:
        raise
    except (OSError, ValueError) as error:
        raise _not_found(name) from error


def _refuse_adapter(name: str) -> None:
    """Check that no adapter lies beside a model: it would be made, too, and its configuration may name code."""
    if find_adapter_config_file(name) is not None:
        raise ConfigError(
            f"model.pretrained_model_name_or_path: '{name}' holds an adapter beside the model: merge it into its "
            'base, or name the base.'
        )


def _override(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        _check_key(config, key, f'model.config_overrides.{key}')
        current = getattr(config, key)
        # A nested table (rope_scaling, ...) is changed key by key, so that one value can be overridden alone.
        is_nested = isinstance(current, dict) and isinstance(value, Mapping)
        setattr(config, key, {**current, **value} if is_nested else value)


def _check_key(config: PretrainedConfig, key: str, path: str, extra: tuple[str, ...] = ()) -> None:
    if not hasattr(config, key) and key not in extra:
        known = list(config.to_dict())
        raise ConfigError(f'{path} is not a setting of {type(config).__name__}{suggest(key, known)}.')


def _make(
    config: PretrainedConfig, weights: Optional[str], *, trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    kwargs |= {'torch_dtype': torch.float32, 'trust_remote_code': trust_remote_code}
    with no_foreign_code(weights or 'model.config', is_trusted=trust_remote_code):
        if weights is None:
            return AutoModelForCausalLM.from_config(config, **kwargs)
        try:
            return AutoModelForCausalLM.from_pretrained(weights, config=config, **kwargs)
        except OSError as error:
            raise _not_found(weights) from error


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    size = len(embeddings)
    if len(tokenizer) > size:
        raise ConfigError(
            f'model: the tokenizer has {len(tokenizer)} tokens, but the vocabulary of the model only {size}; choose '
            "the model's own tokenizer, or a larger vocab_size for fresh weights.",
        )


def _not_found(name: str) -> ConfigError:
    what = 'a folder without a loadable model' if Path(name).is_dir() else 'no folder here, and could not be downloaded'
    return ConfigError(f"model.pretrained_model_name_or_path: '{name}' is {what}.")


def _block_names(model: PreTrainedModel) -> frozenset[str]:
    # transformers names the classes that must stay whole on one device: the decoder blocks, FSDP's natural units.
    return frozenset(model._no_split_modules or ())


def _is_block(module: torch.nn.Module, block_names: frozenset[str]) -> bool:
    return type(module).__name__ in block_names


def _peft_config(settings: Optional[Mapping[str, Any]]) -> Any:
    if settings is None:
        return None
    from peft import LoraConfig  # an optional dependency

    try:
        return LoraConfig(**{'task_type': 'CAUSAL_LM', **settings})
    except TypeError as error:
        raise ConfigError(f'model.peft_config: {error}.') from error
