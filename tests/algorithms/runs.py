# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Small real Trainer runs that the tests of the Algorithms share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

import numpy as np
import torch
from composer import Callback, Evaluator, Event, Logger, State, Trainer
from composer.core import DataSpec
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import dist
from torch.utils.data import DataLoader, TensorDataset

from composer_bema import BEMA
from composer_bema.averaging.parameters import named_parameters, named_persistent_buffers

# The fourth parameter of the trajectory is frozen, and stands first: pairing by position goes wrong there.
TRAINABLE = ('a', 'b', 'c')


class FollowTrajectory(torch.optim.Optimizer):
    """An optimizer whose step t puts the t-th recorded weights into the model."""

    def __init__(self, model: torch.nn.Module, trajectory: dict[str, np.ndarray]) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trajectory = trajectory
        self.t = 0
        super().__init__(self.parameters.values(), {})

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.t += 1
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(self.trajectory[name][self.t].copy()))
        return loss


class TrajectoryModel(ComposerModel):
    """Holds the weights of the golden trajectory at step 0."""

    def __init__(self, trajectory: dict[str, np.ndarray], frozen: bool = True) -> None:
        super().__init__()
        if frozen:
            self.f = torch.nn.Parameter(torch.from_numpy(trajectory['f'][0].copy()), requires_grad=False)
        for name in TRAINABLE:
            setattr(self, name, torch.nn.Parameter(torch.from_numpy(trajectory[name][0].copy())))

    def forward(self, batch: Any) -> torch.Tensor:
        return sum(getattr(self, name).sum() for name in TRAINABLE) * batch[0].sum() * 0  # type: ignore

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return outputs


class ReferenceModel(TrajectoryModel):
    """Keeps what its reference would be overwritten with."""

    def __init__(self, trajectory: dict[str, np.ndarray]) -> None:
        super().__init__(trajectory)
        self.updates: list[dict[str, np.ndarray]] = []

    def update_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.updates.append({n: tensor.numpy().copy() for n, tensor in weights.items()})


class Record(Callback):
    """Keeps what a function returns after each of the given events, by step."""

    def __init__(self, look: Callable[[State], Any], *events: Event) -> None:
        self.look = look
        self.events = events
        self.seen: dict[int, Any] = {}

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in self.events:
            self.seen[state.timestamp.batch.value] = self.look(state)


def follow(trajectory: dict[str, np.ndarray], algorithm: Any, **kwargs: Any) -> dict[int, dict[str, np.ndarray]]:
    """Runs a Trainer along the golden trajectory and returns the average after each step that has one."""
    model = TrajectoryModel(trajectory)
    data = DataLoader(TensorDataset(torch.ones(60, 1)), batch_size=1)

    def average(state: State) -> Optional[dict[str, np.ndarray]]:
        if not algorithm.average.num_updates:
            return None
        return {name: tensor.numpy().copy() for name, tensor in algorithm.average.average().items()}

    record = Record(average, Event.BATCH_END)
    trainer = Trainer(
        model=model,
        optimizers=FollowTrajectory(model, trajectory),
        train_dataloader=data,
        max_duration='60ba',
        algorithms=[algorithm],
        callbacks=[record],
        progress_bar=False,
        device='cpu',
        **kwargs,
    )
    trainer.fit()
    trainer.close()
    return {step: seen for step, seen in record.seen.items() if seen is not None}


def follow_with_reference(
    model: ReferenceModel, trajectory: dict[str, np.ndarray], max_duration: str, fits: int = 1, **settings: Any
) -> list[int]:
    """Trains on the trajectory in epochs of ten steps; returns the steps after which the reference was updated."""
    steps: list[int] = []

    class Watch(Callback):
        def epoch_checkpoint(self, state: State, logger: Logger) -> None:
            self.batch_end_is_over(state)

        def batch_checkpoint(self, state: State, logger: Logger) -> None:
            self.batch_end_is_over(state)

        def batch_end_is_over(self, state: State) -> None:
            steps.extend([state.timestamp.batch.value] * (len(model.updates) - len(steps)))

    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(torch.zeros(10, 1)), batch_size=1),
        optimizers=FollowTrajectory(model, trajectory),
        max_duration=max_duration,
        algorithms=[BEMA(update_ref_model=True, **settings)],
        callbacks=[Watch()],
        device='cpu',
        progress_bar=False,
    )
    for _ in range(fits):
        trainer.fit(reset_time=True)
    trainer.close()
    return steps


def make_classifier(dtype: torch.dtype = torch.float32) -> ComposerClassifier:
    """A small classifier with BatchNorm, a tied weight, and a frozen parameter that comes first."""
    torch.manual_seed(17)
    module = torch.nn.Sequential(
        torch.nn.Linear(8, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(16, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 16),
        torch.nn.Linear(16, 4),
    )
    module[0].weight.requires_grad_(False)
    module[6].weight = module[4].weight
    return ComposerClassifier(module.to(dtype), num_classes=4)


def make_loader(samples: int = 96, batch_size: int = 8, shuffle: bool = True) -> DataSpec:
    """Batches of a fixed noisy problem; a sample counts two tokens."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, 8, generator=generator)
    targets = (inputs[:, :4] + 0.5 * torch.randn(samples, 4, generator=generator)).argmax(dim=1)
    dataset = TensorDataset(inputs, targets)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=dist.get_sampler(dataset, shuffle=shuffle))
    return DataSpec(loader, get_num_tokens_in_batch=lambda batch: 2 * len(batch[0]))


def make_evaluator(label: str) -> Evaluator:
    return Evaluator(label=label, dataloader=make_loader(32, shuffle=False), metric_names=['MulticlassAccuracy'])


def make_trainer(
    *algorithms: Any,
    model: Optional[ComposerModel] = None,
    max_duration: str = '2ep',
    train_dataloader: Any = None,
    **kwargs: Any,
) -> Trainer:
    """A Trainer of the classifier, 12 steps an epoch, without an evaluator unless it is given."""
    model = make_classifier() if model is None else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW(trainable, lr=0.02),
        train_dataloader=make_loader() if train_dataloader is None else train_dataloader,
        max_duration=max_duration,
        algorithms=list(algorithms),
        progress_bar=False,
        device='cpu',
        seed=5,
        **kwargs,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's parameters and persistent buffers by canonical name."""
    named = {**named_parameters(model), **named_persistent_buffers(model)}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
