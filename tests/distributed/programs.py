# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny real Trainer runs under every topology, for the ranks of `tests.distributed.ranks` to run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Optional
from unittest import mock

import torch
from composer import Algorithm, Callback, Event, Logger, State, Trainer
from composer.core import DataSpec
from composer.models import ComposerClassifier
from composer.utils import FSDP2Config, dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import _optim_utils
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 64
GLOBAL_BATCH = 8
STEPS_PER_EPOCH = SAMPLES // GLOBAL_BATCH


@dataclasses.dataclass(frozen=True)
class Topology:
    """How many ranks share a model, and how; several ranks without FSDP are DDP."""

    world_size: int = 1
    wrapper: Literal['none', 'fsdp1', 'fsdp2'] = 'none'
    state_dict_type: Literal['sharded', 'full'] = 'sharded'
    reshard: bool = True
    """Whether the parameters are sharded again after the forward pass; if not, FSDP1 calls it SHARD_GRAD_OP."""
    replicas: Optional[int] = None
    """How many copies of the sharded model there are (HSDP). FSDP1 only: Composer puts a mesh of one dimension in the
    place of any that FSDP2 is given. With one rank a copy FSDP1 forgets to average the gradients of the copies."""
    load_monolith_rank0_only: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether a checkpoint is a folder of shards."""
        return self.wrapper != 'none' and self.state_dict_type == 'sharded'

    def checkpoint(self, folder: Path | str, step: int) -> str:
        """The `load_path` of what was saved in `folder` after a step."""
        epoch = step // STEPS_PER_EPOCH
        return f'{folder}/ep{epoch}-ba{step}' + ('' if self.is_sharded else '-rank0.pt')

    def parallelism_config(self, dtype: torch.dtype = torch.float32) -> Optional[dict[str, Any]]:
        # Composer's default on a CPU is to compute in fp32, whatever the batch.
        mixed_precision = 'DEFAULT' if dtype == torch.float32 else 'FULL'
        if self.wrapper == 'none':
            return None
        if self.wrapper == 'fsdp2':
            assert self.replicas is None, 'Composer has no HSDP with FSDP2'
            fsdp2 = FSDP2Config(
                reshard_after_forward=self.reshard,
                state_dict_type=self.state_dict_type,
                load_monolith_rank0_only=self.load_monolith_rank0_only,
                mixed_precision=mixed_precision,
            )
            return {'fsdp': fsdp2}
        if self.replicas is None:
            strategy = 'FULL_SHARD' if self.reshard else 'SHARD_GRAD_OP'
        else:
            strategy = 'HYBRID_SHARD' if self.reshard else '_HYBRID_SHARD_ZERO2'
        fsdp1 = {
            'use_orig_params': True,
            'sharding_strategy': strategy,
            'state_dict_type': self.state_dict_type,
            'data_parallel_replicate_degree': self.replicas,
            'mixed_precision': mixed_precision,
            'load_monolith_rank0_only': self.load_monolith_rank0_only,
            'sync_module_states': self.load_monolith_rank0_only,
        }
        return {'fsdp': fsdp1}


TOPOLOGIES = {
    'single': Topology(),
    'ddp': Topology(2),
    'fsdp1': Topology(2, 'fsdp1'),
    'fsdp1-grad-op': Topology(2, 'fsdp1', reshard=False),
    'fsdp1-hybrid': Topology(4, 'fsdp1', replicas=2),
    'fsdp1-one-rank': Topology(1, 'fsdp1'),
    'fsdp1-full': Topology(2, 'fsdp1', 'full'),
    'fsdp1-full-one-rank': Topology(1, 'fsdp1', 'full'),
    'fsdp1-full-rank0-only': Topology(2, 'fsdp1', 'full', load_monolith_rank0_only=True),
    'fsdp2': Topology(2, 'fsdp2'),
    'fsdp2-grad-op': Topology(2, 'fsdp2', reshard=False),
    'fsdp2-four-ranks': Topology(4, 'fsdp2'),
    'fsdp2-one-rank': Topology(1, 'fsdp2'),
    'fsdp2-full': Topology(2, 'fsdp2', 'full'),
    'fsdp2-full-one-rank': Topology(1, 'fsdp2', 'full'),
    'fsdp2-full-rank0-only': Topology(2, 'fsdp2', 'full', load_monolith_rank0_only=True),
}


def make_model(
    dtype: torch.dtype = torch.float32, tied: bool = False, batch_norm: bool = True, device: str = 'cpu'
) -> ComposerClassifier:
    """A classifier whose sizes no number of ranks divides, in several FSDP units; a frozen weight comes first."""
    torch.manual_seed(17)
    with torch.device(device):
        first, second = torch.nn.Linear(13, 13), torch.nn.Linear(13, 13)
        if tied:
            second.weight = first.weight
        units = (
            torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.ReLU()),
            torch.nn.Sequential(first, torch.nn.ReLU(), second),
            torch.nn.Linear(13, 5),
        )
        for unit in units:
            unit._fsdp_wrap = True  # type: ignore
        norm = torch.nn.BatchNorm1d(7) if batch_norm else torch.nn.LayerNorm(7)
        module = torch.nn.Sequential(torch.nn.Linear(9, 7), norm, *units).to(dtype)
    module[0].weight.requires_grad_(False)
    return ComposerClassifier(module, num_classes=5)


def make_loader(dtype: torch.dtype = torch.float32) -> DataSpec:
    """Eight batches of a fixed problem; the ranks together see in a step what one rank alone would see in it."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 9, generator=generator)
    targets = (inputs[:, :5] + 0.5 * torch.randn(SAMPLES, 5, generator=generator)).argmax(dim=1)
    dataset = TensorDataset(inputs.to(dtype), targets)
    loader = DataLoader(dataset, GLOBAL_BATCH // dist.get_world_size(), sampler=dist.get_sampler(dataset))
    return DataSpec(loader, get_num_tokens_in_batch=lambda batch: 2 * len(batch[0]))


def make_optimizer(model: torch.nn.Module, name: Literal['adamw', 'sgd']) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == 'sgd':
        return torch.optim.SGD(trainable, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(trainable, lr=0.02)


def full_weights(state: State) -> dict[str, Any]:
    """The model's state dict, every tensor in full on every rank; buffers are the rank's own."""
    weights = get_model_state_dict(state.model, options=StateDictOptions(full_state_dict=False))
    return {name: in_full(tensor) for name, tensor in weights.items()}


def full_optimizer(state: State) -> dict[str, Any]:
    """The optimizer's moments in full on every rank, by the parameter's name and the moment's; none before a step."""
    if state.timestamp.batch == 0:
        # An optimizer without a state would be made to take a step to show one.
        return {}
    saved = get_optimizer_state_dict(state.model, state.optimizers[0], options=StateDictOptions(full_state_dict=False))
    entries = saved['state'].items()
    return {f'{name}/{key}': in_full(value) for name, entry in entries for key, value in entry.items()}


def full_state(state: State) -> dict[str, dict[str, Any]]:
    return {'weights': full_weights(state), 'optimizer': full_optimizer(state)}


def in_full(value: Any) -> Any:
    """A copy of a tensor that may be sharded (all ranks ask at once); another value as it is."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


class Look(Callback):
    """Keeps what a function returns at each of the given events, by event and step."""

    def __init__(self, look: Callable[[State], Any], events: Sequence[str]) -> None:
        self.look = look
        self.events = [Event(event) for event in events]
        self.seen: dict[tuple[str, int], Any] = {}

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in self.events:
            self.seen[event.value, state.timestamp.batch.value] = self.look(state)


@contextlib.contextmanager
def running(
    topology: Topology,
    *,
    algorithms: Sequence[Callable[[], Algorithm]] = (),
    callbacks: Sequence[Callable[[], Callback]] = (),
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    batch_norm: bool = True,
    optimizer: Literal['adamw', 'sgd'] = 'adamw',
    max_duration: str = f'{STEPS_PER_EPOCH}ba',
    **kwargs: Any,
) -> Iterator[Trainer]:
    """A Trainer of `make_model` in what its topology needs on a CPU; closed at the end, unless something is raised.

    Args:
        topology (Topology): With as many ranks as there are.
        algorithms, callbacks (Sequence[Callable]): What makes them, such as ``functools.partial(BEMA, '2ba')``.
        dtype, tied, batch_norm: Of the model. Under FSDP1 a BatchNorm is given fp32, so that bf16 needs the other norm.
        optimizer (str): ``'adamw'`` or ``'sgd'``.
        max_duration (str): By default one epoch of eight steps.
        kwargs: The other arguments of the Trainer, such as ``save_folder``, ``load_path`` or ``autoresume``.
    """
    # FSDP2 takes all weights from rank 0 only if the other ranks have none.
    has_weights = not (topology.wrapper == 'fsdp2' and topology.load_monolith_rank0_only and dist.get_global_rank())
    model = make_model(dtype, tied, batch_norm, 'cpu' if has_weights else 'meta')
    patches = fsdp1_on_a_cpu() if topology.wrapper == 'fsdp1' else contextlib.nullcontext()
    # Asking for the processor's name takes longer than the run.
    with patches, mock.patch('composer.utils.collect_env.get_cpu_model', return_value='CPU'):
        trainer = Trainer(
            model=model,
            optimizers=make_optimizer(model, optimizer),
            train_dataloader=make_loader(dtype),
            max_duration=max_duration,
            algorithms=[make() for make in algorithms],
            callbacks=[make() for make in callbacks],
            parallelism_config=topology.parallelism_config(dtype),
            progress_bar=False,
            device='cpu',
            seed=5,
            **kwargs,
        )
        yield trainer
        trainer.close()


def train(
    topology: Topology,
    *,
    look: Callable[[State], Any] = full_state,
    events: Sequence[str] = ('fit_start', 'batch_end'),
    callbacks: Sequence[Callable[[], Callback]] = (),
    **kwargs: Any,
) -> dict[tuple[str, int], Any]:
    """Runs `fit` and returns what `look` saw on this rank, by event and step; the other arguments are `running`'s.

    It looks after the other callbacks, but before the one that saves: at ``'batch_checkpoint'`` it sees what is saved.
    """
    seen = Look(look, events)
    with running(topology, callbacks=[*callbacks, lambda: seen], **kwargs) as trainer:
        trainer.fit()
    return seen.seen


@contextlib.contextmanager
def fsdp1_on_a_cpu() -> Iterator[None]:
    """FSDP1 is made for GPUs: these places go wrong where the CPU is the device as well."""
    fsdp = 'torch.distributed.fsdp'
    unflatten = _optim_utils._unflatten_orig_param_states

    def unflatten_and_copy(info: Any, states: dict[str, dict[str, Any]], name: str, *args: Any) -> None:
        unflatten(info, states, name, *args)
        for state in states.values():
            if name in state:
                state[name] = state[name].clone()

    with (
        # The device that Composer hands to FSDP1.
        mock.patch('torch.cuda.current_device', lambda: torch.device('cpu')),
        # A full model state is moved to the CPU and its memory on the device freed, which is the same memory here.
        mock.patch(f'{fsdp}._flat_param.FlatParamHandle.to_cpu', lambda handle: contextlib.nullcontext()),
        # In a full optimizer state one buffer gathers all moments, each moved to the CPU before the next one comes.
        mock.patch(f'{fsdp}._optim_utils._unflatten_orig_param_states', unflatten_and_copy),
        # Rank 0's weights are not sent to ranks that have theirs on the CPU, though gloo could.
        mock.patch(f'{fsdp}._init_utils._check_module_states_for_sync_module_states'),
    ):
        yield
