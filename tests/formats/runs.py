# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny real runs of Hugging Face models, whose checkpoints are read, and the weights that they ought to hold."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from composer import Evaluator, State
from composer.core import DataSpec
from composer.metrics import LanguageCrossEntropy
from composer.models import HuggingFaceModel
from composer.utils import dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from composer_bema import BEMA, EMA
from tests.distributed import programs
from tests.distributed.programs import Topology

AVERAGES = {
    'bema': lambda: BEMA('1ba', save_weights='average', eval_labels=['bema']),
    'bema beside': lambda: BEMA('1ba', save_weights='training', eval_labels=['bema']),
    'bema alone': lambda: BEMA('1ba', save_weights='average', eval_labels=['bema'], state_in_checkpoint=False),
    'ema': lambda: EMA(half_life='3ba', update_freq='1ba', save_weights='training', eval_labels=['ema']),
}
TINY = {
    'vocab_size': 259,
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 16,
}


def save_run(
    folder: str,
    topology: Topology = Topology(),  # noqa: B008 (it is frozen)
    averages: tuple[str, ...] = ('bema',),
    *,
    tied: bool = True,
    dtype: str = 'float32',
    frozen: bool = False,
    lora: bool = False,
    **kwargs: Any,
) -> dict[str, dict[str, torch.Tensor]]:
    """Trains four steps and saves the last two of them under ``folder``.

    Returns:
        dict[str, dict[str, torch.Tensor]]: What the last checkpoint ought to hold: ``training``, ``theta_0`` (the
            weights before the first step), and each average by its class; whole tensors, on rank 0.
    """
    model = make_model(tied, dtype, frozen, lora)
    patches = {'make_model': lambda *args: model, 'make_loader': lambda *args: make_loader()}
    with contextlib.nullcontext() if kwargs.pop('classifier', False) else mock.patch.multiple(programs, **patches):
        seen = programs.train(
            topology,
            look=weights_of,
            events=('fit_start', 'batch_end'),
            algorithms=[AVERAGES[name] for name in averages],
            max_duration='4ba',
            save_folder=folder,
            save_interval='2ba',
            eval_dataloader=[Evaluator(label=label, dataloader=programs.make_loader()) for label in ('bema', 'ema')],
            eval_interval='9ba',
            **kwargs,
        )
    # A resumed run has not seen them.
    start = seen.get(('fit_start', 0), {'training': {}})
    return {**seen['batch_end', 4], 'theta_0': start['training']}


def make_model(tied: bool = True, dtype: str = 'float32', frozen: bool = False, lora: bool = False) -> HuggingFaceModel:
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied)).to(getattr(torch, dtype))
    # Units for FSDP, as training/models.py names them.
    model.fsdp_wrap_fn = lambda module: type(module).__name__ == 'LlamaDecoderLayer'
    if frozen:
        model.model.layers[0].requires_grad_(False)
    return HuggingFaceModel(
        model,
        ByT5Tokenizer(extra_ids=0),
        use_logits=True,
        metrics=[LanguageCrossEntropy()],
        peft_config=lora_config() if lora else None,
    )


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type='CAUSAL_LM', r=2, target_modules=['q_proj', 'v_proj'], init_lora_weights=False)


def make_loader() -> DataSpec:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 259, (32, 12), generator=generator)
    batches = [{'input_ids': row, 'labels': row, 'attention_mask': torch.ones_like(row)} for row in rows]
    return DataSpec(DataLoader(batches, 8 // dist.get_world_size(), sampler=dist.get_sampler(batches)))


def weights_of(state: State) -> dict[str, dict[str, torch.Tensor]]:
    averages = {}
    for algorithm in state.algorithms:
        if algorithm.average.num_updates:
            average: Optional[dict[str, torch.Tensor]] = algorithm.averaged_state_dict()
            averages[type(algorithm).__name__] = {name: tensor.clone() for name, tensor in (average or {}).items()}
    return {'training': programs.full_weights(state), **averages}


class Saved(NamedTuple):
    """The last checkpoint of a run, and what it ought to hold."""

    path: Path
    weights: dict[str, dict[str, torch.Tensor]]

    def copy_to(self, folder: Path) -> Path:
        """Copies the checkpoint, to be damaged."""
        copy = folder / self.path.name
        if self.path.is_dir():
            return Path(shutil.copytree(self.path, copy))
        return Path(shutil.copy(self.path, copy))


_RUNS: dict[str, dict[str, Any]] = {
    # The model holds BEMA.
    'two averages': {'averages': ('bema', 'ema')},
    'bf16': {'averages': ('bema',), 'dtype': 'bfloat16', 'tied': False, 'frozen': True},
    'training': {'averages': ('bema beside',)},
    'alone': {'averages': ('bema alone',)},
    'none': {'averages': ()},
    'weights only': {'averages': ('bema',), 'save_weights_only': True},
    'lora': {'averages': ('bema',), 'lora': True},
    # No Hugging Face model, and one with BatchNorm.
    'classifier': {'averages': ('bema',), 'classifier': True},
}


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix='checkpoints-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def saved(name: str) -> Saved:
    """A monolithic checkpoint of one of the runs above; for the session, so that nobody may change it."""
    folder = _folder() / name.replace(' ', '-')
    weights = save_run(str(folder), **_RUNS[name])
    return Saved(folder / 'ep0-ba4-rank0.pt', weights)


@functools.cache
def saved_in_parts(name: str) -> Saved:
    """The same as two ranks would have saved it, as torch's own writer does."""
    whole = saved(name)
    path = _folder() / f'{name.replace(" ", "-")}-in-parts' / 'ep0-ba4'
    save_in_parts(whole.path, path)
    return Saved(path, whole.weights)


def save_in_parts(file: Path, folder: Path) -> None:
    """Saves a monolithic checkpoint again, as two ranks would have."""
    nest = torch.load(file, weights_only=False)
    nest['state']['model'] = in_parts(nest['state']['model'])
    for entry in nest['state']['callbacks'].get('AveragingCheckpoint', {}).values():
        if isinstance(entry, dict):
            groups = {**entry.pop('buffers'), 'training_weights': entry.pop('training_weights', {})}
            groups = {group: in_parts(tensors, flat=True) for group, tensors in groups.items()}
            entry.update({'training_weights': groups.pop('training_weights'), 'buffers': groups})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dcp.save(nest, storage_writer=dcp.FileSystemWriter(folder))


def in_parts(tensors: dict[str, torch.Tensor], flat: bool = False) -> dict[str, torch.Tensor]:
    halves = {name: InTwo(tensor.reshape(-1) if flat else tensor) for name, tensor in tensors.items() if tensor.dim()}
    return {name: halves.get(name, tensor) for name, tensor in tensors.items()}


class InTwo(torch.Tensor):
    """A tensor that torch's distributed checkpoint saves as two halves."""

    whole: torch.Tensor

    @staticmethod
    def __new__(cls, whole: torch.Tensor) -> InTwo:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)  # type: ignore

    def __init__(self, whole: torch.Tensor) -> None:
        super().__init__()
        self.whole = whole.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(func)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(self.whole), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        rows, *others = self.size()
        ranges = [(0, rows // 2), (rows // 2, rows - rows // 2)]
        return [
            ChunkStorageMetadata(torch.Size([start, *[0] * len(others)]), torch.Size([length, *others]))
            for start, length in ranges
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        (chunk,) = [chunk for chunk in self.__create_chunk_list__() if chunk.offsets == index.offset]
        return self.whole[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]]
