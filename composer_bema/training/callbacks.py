# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Callbacks of our own that a YAML can name."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union, cast

import torch
from composer.core import Callback, Event, State, Time
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.utils import create_interval_scheduler, dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from composer_bema.algorithms.weight_averaging import averages_among
from composer_bema.averaging.parameters import canonical_names
from composer_bema.flops import Architecture, architecture_of, training_flops
from composer_bema.formats.composer import TRAINING
from composer_bema.formats.huggingface import (
    ModelWriter,
    model_without_memory,
    new_folder,
    write_adapter,
    write_weights,
)
from composer_bema.formats.manifest import write_manifest
from composer_bema.formats.tensors import LazyTensor, dtype_named
from composer_bema.preference.dpo import DPO
from composer_bema.training.registry import build

__all__ = ['FlopsMonitor', 'HuggingFaceCheckpointer']


class FlopsMonitor(Callback):
    """Logs the FLOPs that training has taken so far as ``flops/total``, over which losses can be drawn.

    They are those of the tokens that the run has counted, as :func:`composer_bema.flops.training_flops` has it: a
    function of the run's clock alone, so that nothing is saved and a resumed run logs what the uninterrupted one does.
    It logs on BATCH_END, which comes before the step's evaluations, and on EVAL_START for those before the first step;
    lines of ``metrics.jsonl`` belong together by their ``batch``.

    Args:
        sequence_length (int): Tokens in a sequence (in a YAML ``${max_seq_len}``), on which the cost of attention
            depends. The tokens of shorter sequences are counted as if they stood in sequences of this length.
        architecture (Architecture | Mapping[str, Any], optional): The sizes of the model, or the arguments of
            :class:`.Architecture`; ``None``: the configuration of the ``HuggingFaceModel`` that is trained tells them.

    Raises:
        ValueError: The architecture cannot be told, or the data counts no tokens.
    """

    def __init__(
        self, sequence_length: int, architecture: Optional[Union[Architecture, Mapping[str, Any]]] = None
    ) -> None:
        if isinstance(architecture, Mapping):
            architecture = cast(Architecture, build(Architecture, architecture, 'architecture'))
        self.sequence_length = sequence_length
        self.architecture = architecture
        self.flops_per_token = 0

    def init(self, state: State, logger: Logger) -> None:
        """Find out what a token costs."""
        del logger
        architecture = self.architecture or _architecture_in(state)
        self.flops_per_token = training_flops(architecture, self.sequence_length, tokens=1)
        if isinstance(state.model, DPO):
            # The reference's forward pass, beside a forward and a backward pass, which costs twice as much.
            self.flops_per_token += self.flops_per_token // 3

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log; the evaluations of this step come after it."""
        if state.timestamp.token == 0:
            raise ValueError(
                'FlopsMonitor needs to know how many tokens were seen, but the data of this run counts none: give the '
                'dataloader a DataSpec with get_num_tokens_in_batch.',
            )
        self._log(state, logger)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Log, for an evaluation that no step comes before."""
        self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        # A float: many loggers keep integers in 64 bits, which overflow at 9e18.
        logger.log_metrics({'flops/total': float(self.flops_per_token * state.timestamp.token.value)})


def _architecture_in(state: State) -> Architecture:
    if not isinstance(state.model, HuggingFaceModel):
        raise ValueError(
            f'FlopsMonitor finds no sizes in a {type(state.model).__name__}, which is no HuggingFaceModel: give it an '
            'architecture.',
        )
    return architecture_of(state.model.config)


class HuggingFaceCheckpointer(Callback):
    """Writes the model as a Hugging Face folder: configuration, tokenizer and safetensors.

    It writes on the events on which checkpoints are written, so the weights are those that a checkpoint would hold:
    under an averaging algorithm, those that its ``save_weights`` names.

    Args:
        save_folder (str): The folder to write; it appears, or is replaced, when it is complete. ``{batch}`` in it
            stands for the number of optimizer steps.
        save_interval (str): A Composer time string. Default: ``'1dur'``, once, at the end.
        precision (str): The dtype of the weights written: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
            Default: ``'float32'``.

    Raises:
        ValueError: If there is no such dtype, or the model of the run is no ``HuggingFaceModel``.
    """

    def __init__(self, save_folder: str, save_interval: str = '1dur', precision: str = 'float32') -> None:
        dtype = dtype_named(precision, 'precision')
        assert dtype is not None
        self.save_folder = save_folder
        self.dtype = dtype
        # llm-foundry's names, by which an average knows that this callback is about to save.
        self.check_interval = create_interval_scheduler(save_interval)
        self.last_checkpoint_batch: Time | None = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Write when a checkpoint is due."""
        del logger
        if event == Event.INIT:
            _trained_model(state)
        batch = state.timestamp.batch
        is_due = state.get_elapsed_duration() is not None and self.check_interval(state, event)
        if is_due and batch != self.last_checkpoint_batch:
            self.last_checkpoint_batch = batch
            self._save(state, Path(self.save_folder.replace('{batch}', str(batch.value))))

    def _save(self, state: State, folder: Path) -> None:
        composer_model = _trained_model(state)
        # Collective under FSDP: every rank takes part in gathering, and rank 0 gets the tensors.
        gathered = get_model_state_dict(
            composer_model.model,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        if dist.get_global_rank() == 0:
            names = canonical_names(composer_model.model, list(gathered))
            weights = {
                name: LazyTensor.of(tensor).to(self.dtype)
                for name, tensor in zip(names, gathered.values(), strict=True)
                if isinstance(tensor, torch.Tensor)
            }
            holding = (type(a).__name__ for a in averages_among(state.algorithms) if a.average.swapped)
            with new_folder(folder, replace=True) as unfinished:
                _write(composer_model, weights, unfinished)
                write_manifest(unfinished, next(holding, TRAINING), {'step': state.timestamp.batch.value})
        dist.barrier()


def _trained_model(state: State) -> HuggingFaceModel:
    model = state.model.module if state.is_model_ddp else state.model
    if not isinstance(model, HuggingFaceModel):
        raise ValueError(
            f'HuggingFaceCheckpointer writes models of transformers, and a {type(model).__name__} is no '
            "HuggingFaceModel: wrap the model in one, or save it with the Trainer's save_folder alone.",
        )
    return model


def _write(composer_model: HuggingFaceModel, weights: dict[str, LazyTensor], folder: Path) -> None:
    model: Any = composer_model.model
    if composer_model.using_peft:
        state = {name: tensor.read() for name, tensor in weights.items()}
        # Not the adapter of a reference, which would get a folder of its own.
        write_adapter(folder, model, state, selected_adapters=[model.active_adapter])
    else:
        model = model.module if isinstance(model, FullyShardedDataParallel) else model
        # The class without what FSDP2 makes of it.
        model_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
        bare = model_without_memory(model_class, copy.deepcopy(model.config))
        if bare is not None and model.can_generate():
            bare.generation_config = model.generation_config
        specs = {name: tensor.spec for name, tensor in weights.items()}
        write_weights(ModelWriter(folder, json.loads(model.config.to_json_string()), specs, bare), weights)
    if composer_model.tokenizer is not None:
        composer_model.tokenizer.save_pretrained(folder)
