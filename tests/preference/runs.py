# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny DPO runs of a real Trainer, for tests in this process and for ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from composer import Callback, Evaluator, State, Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from composer_bema import BEMA
from composer_bema.preference import DPO
from tests.distributed.programs import TOPOLOGIES, Topology, fsdp1_on_a_cpu, full_weights

VOCABULARY = 31
PAIRS = 16
GLOBAL_BATCH = 4

Pair = dict[str, list[int]]

# Every step matters, so that an order or a clock that is off by one shows.
BEMA_SETTINGS: dict[str, Any] = {
    'update_freq': '1ba',
    'update_ref_model': True,
    'ref_model_update_freq': '3ba',
    'ref_model_update_after': '2ba',
}


def make_policy(model_type: str = 'llama', seed: int = 5, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A causal language model of a few thousand parameters, in two blocks that FSDP takes for units."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.fsdp_wrap_fn = is_block
    return model


def is_block(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith('DecoderLayer')


def with_adapter(policy: PreTrainedModel, adapter_name: str = 'default', **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    config = LoraConfig(**{'task_type': 'CAUSAL_LM', 'r': 2, 'target_modules': ['q_proj', 'v_proj'], **settings})
    return get_peft_model(policy, config, adapter_name=adapter_name)


def make_pairs(count: int = PAIRS, seed: int = 7) -> list[Pair]:
    """Pairs of tokens of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {'prompt_ids': tokens(2, 8), 'chosen_ids': tokens(1, 9), 'rejected_ids': tokens(1, 9)} for _ in range(count)
    ]


def collate(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """A batch as the model takes it."""
    rows = [(p['prompt_ids'], p[side]) for p in pairs for side in ('chosen_ids', 'rejected_ids')]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {'input_ids': [], 'attention_mask': [], 'labels': []}
    for prompt, completion in rows:
        used, rest = len(prompt) + len(completion), length - len(prompt) - len(completion)
        batch['input_ids'].append([*prompt, *completion, *[0] * rest])
        batch['attention_mask'].append([1] * used + [0] * rest)
        batch['labels'].append([-100] * len(prompt) + completion + [-100] * rest)
    return {name: torch.tensor(rows).view(len(pairs), 2, length) for name, rows in batch.items()}


def count_pairs(batch: dict[str, torch.Tensor]) -> dict[str, int]:
    return {'total': int(batch['attention_mask'].sum()), 'loss_generating': len(batch['labels'])}


def make_loader(pairs: Sequence[Pair], batch_size: int = GLOBAL_BATCH) -> DataSpec:
    """The pairs in their order; the ranks together see in a step what one rank alone would see in it."""
    data: Any = list(pairs)
    sampler = dist.get_sampler(data, shuffle=False)
    loader = DataLoader(data, batch_size // dist.get_world_size(), sampler=sampler, collate_fn=collate)
    return DataSpec(loader, get_num_tokens_in_batch=count_pairs)


def make_optimizer(model: torch.nn.Module, topology: Topology) -> torch.optim.Optimizer:
    """SGD, for what rounding makes of a gradient of zero would not be small after AdamW."""
    # Where FSDP2 wants the mean of the ranks' gradients, gloo returns their sum.
    ranks = topology.world_size if topology.wrapper == 'fsdp2' else 1
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trainable, lr=0.1 / ranks, momentum=0.9)


class Losses(Callback):
    """Keeps the loss of every step, the mean over ranks."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_loss(self, state: State, logger: Any) -> None:
        assert isinstance(state.loss, torch.Tensor)
        loss = state.loss.detach().clone()
        dist.all_reduce(loss)
        self.values.append(loss.item() / dist.get_world_size())


class References(Callback):
    """Keeps the whole reference of a model before and after evaluations."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def eval_before_all(self, state: State, logger: Any) -> None:
        self.seen.append(reference_weights(state))

    def eval_batch_end(self, state: State, logger: Any) -> None:
        self.seen.append(reference_weights(state))


def reference_weights(state: State) -> dict[str, torch.Tensor]:
    """The reference's whole tensors: all of a model of its own, or its adapter."""
    weights = full_weights(state)
    return {n: t.clone() for n, t in weights.items() if {'reference', 'reference_model'} & set(n.split('.'))}


def save_tuned(folder: Path, sharded: bool) -> str:
    """Saves the weights of another policy as a run without a reference leaves them, and returns their path."""
    state = {'state': {'model': {f'model.{n}': t for n, t in make_policy(seed=11).state_dict().items()}}}
    if sharded:
        dcp.save(state, checkpoint_id=folder / 'tuned')
        return str(folder / 'tuned')
    torch.save(state, folder / 'tuned.pt')
    return str(folder / 'tuned.pt')


def train(
    steps: int,
    *,
    topology: str = 'single',
    adapter: bool = False,
    model: Optional[DPO] = None,
    bema: Optional[dict[str, Any]] = None,
    pairs: Optional[Sequence[Pair]] = None,
    batch_size: int = GLOBAL_BATCH,
    load_path: Optional[str] = None,
    save_folder: Optional[Path] = None,
    save_step: Optional[int] = None,
    evaluate: bool = False,
    optimizer: Optional[torch.optim.Optimizer] = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains on pairs in their order, those of :func:`make_pairs` if none are given; returns what came of it.

    The other settings are the Trainer's. All ranks return the same.
    """
    layout = TOPOLOGIES[topology]
    version = '2' if layout.wrapper == 'fsdp2' else '1'
    with mock.patch.dict(os.environ, FSDP_VERSION=version), fsdp1_on_a_cpu():
        if model is None:
            policy = make_policy()
            model = DPO(with_adapter(policy) if adapter else policy)
        if version == '2' and layout.load_monolith_rank0_only and dist.get_global_rank():
            # FSDP2 takes all weights from rank 0 only if the other ranks have none.
            model.to('meta')
        algorithm = BEMA(**(BEMA_SETTINGS if bema is None else bema))
        losses, references = Losses(), References()
        loader = make_loader(pairs or make_pairs(), batch_size)
        held_out = Evaluator(label='held_out', dataloader=make_loader(make_pairs(8, seed=8)))
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            eval_dataloader=held_out if evaluate else None,
            eval_interval='2ba',
            optimizers=optimizer or make_optimizer(model, layout),
            max_duration=f'{steps}ba',
            algorithms=[algorithm],
            callbacks=[losses, references],
            parallelism_config=layout.parallelism_config(),
            device='cpu',
            seed=9,
            progress_bar=False,
            save_folder=None if save_folder is None else str(save_folder),
            save_interval=f'{save_step or steps}ba',
            save_overwrite=True,
            load_path=load_path,
            **settings,
        )
        loaded = reference_weights(trainer.state)
        trainer.fit()
        metrics = {n: float(m.compute()) for n, m in trainer.state.eval_metrics.get('held_out', {}).items()}
        result = {
            'losses': losses.values,
            'loaded_reference': loaded,
            'reference': reference_weights(trainer.state),
            'references_seen': references.seen,
            'weights': {n: t.clone() for n, t in full_weights(trainer.state).items()},
            'average': {n: t.clone() for n, t in algorithm.averaged_state_dict().items()},
            'num_ref_model_updates': getattr(algorithm.reference_updates, 'num_updates', 0),
            'metrics': metrics,
            'train_metrics': {n: float(m.compute()) for n, m in (trainer.state.train_metrics or {}).items()},
        }
        trainer.close()
    return result
