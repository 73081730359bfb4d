# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The averages that others keep and ours, behind one face, as their users call them.

Composer's, torch's and diffusers' are their own code. TRL's ``BEMACallback`` and the paper's reference need a Trainer
of transformers around them, so that their updates are written out here, operation by operation: what decides their cost
is which temporaries they make.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Optional
from unittest import mock

import torch
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from composer_bema.averaging import kernels
from composer_bema.averaging.decay import ConstantDecay
from composer_bema.averaging.rules import BEMA, DEMA, EMA, OUEMA, Rule
from composer_bema.averaging.state import AverageState, NonFinite
from composer_bema.averaging.windows import SWAWindow, Window

# The same at every update and for all.
BETA = 0.01
ALPHA = 0.5

Kind = Literal['ema', 'bema', 'other']


@dataclass(frozen=True)
class Kept:
    """The average of a model.

    Args:
        update: Brings it up to the weights.
        average: Returns it, tensor by tensor.
        swap_in: Puts it into the model. None where there is nothing to put in, since it is a model of its own.
        swap_out: Puts the training weights back.
    """

    update: Callable[[], object]
    average: Callable[[], Iterable[torch.Tensor]]
    swap_in: Optional[Callable[[], object]] = None
    swap_out: Optional[Callable[[], object]] = None


@dataclass(frozen=True)
class Method:
    """A way to keep an average.

    Args:
        name: What tables call it.
        kind: What it computes.
        keep: Starts an average of a model's weights.
        copies: The most copies of the model that there are of it during an update.
    """

    name: str
    kind: Kind
    keep: Callable[[torch.nn.Module], Kept]
    copies: int = 3


def ours(name: str, rule: Rule, kind: Kind, nonfinite: NonFinite = 'raise', **settings: Any) -> Method:
    """One of the package's averages."""

    def keep(model: torch.nn.Module) -> Kept:
        state = AverageState(rule, nonfinite=nonfinite, **settings)
        state.start(model)
        return Kept(
            lambda: state.update(model, step=1),
            lambda: state.average().values(),
            lambda: state.swap_in(model),
            state.swap_out,
        )

    return Method(name, kind, keep)


def by_torch_alone(method: Method) -> Method:
    """One of the package's averages where it was installed without a C compiler."""

    def without_compiled(action: Callable[[], object]) -> Callable[[], object]:
        return mock.patch.object(kernels, '_compiled', lambda: None)(action)

    def keep(model: torch.nn.Module) -> Kept:
        kept = method.keep(model)
        return Kept(
            without_compiled(kept.update),
            kept.average,
            kept.swap_in and without_compiled(kept.swap_in),
            kept.swap_out and without_compiled(kept.swap_out),
        )

    return Method(f'{method.name}, by torch alone', method.kind, keep)


def keep_composers(model: torch.nn.Module) -> Kept:
    """Composer's EMA."""
    ema = EMAParameters(model)

    def swap() -> None:
        ema.swap_params(model)

    return Kept(
        lambda: compute_ema(model, ema, smoothing=1 - BETA), lambda: ema.named_parameters_dict.values(), swap, swap
    )


def keep_averaged_model(model: torch.nn.Module, **function: Any) -> Kept:
    """The EMA of torch, which is a model of its own. Its first update copies."""
    average = AveragedModel(model, **function)
    average.update_parameters(model)
    return Kept(lambda: average.update_parameters(model), average.parameters)


def keep_diffusers(model: torch.nn.Module) -> Kept:
    """The EMA of diffusers, without its warmup. Its first update copies."""
    from diffusers.training_utils import EMAModel

    ema = EMAModel(model.parameters(), decay=1 - BETA, min_decay=1 - BETA)
    ema.step(model.parameters())

    def swap_in() -> None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())

    return Kept(
        lambda: ema.step(model.parameters()),
        lambda: ema.shadow_params,
        swap_in,
        lambda: ema.restore(model.parameters()),
    )


def keep_trls(model: torch.nn.Module) -> Kept:
    """TRL's BEMA: buffers and average in the weights' dtype, the average a model of its own, tensor by tensor."""
    theta = list(model.parameters())
    theta_0 = [parameter.detach().clone() for parameter in theta]
    ema = [tensor.clone() for tensor in theta_0]
    average = list(copy.deepcopy(model).parameters())

    @torch.no_grad()
    def update() -> None:
        for now, start, mean, result in zip(theta, theta_0, ema, average, strict=True):
            mean.mul_(1 - BETA).add_(now, alpha=BETA)
            result.copy_(mean + ALPHA * (now - start))

    return Kept(update, lambda: average)


def keep_references(model: torch.nn.Module) -> Kept:
    """The BEMA of the paper's authors: fp32 buffers, all tensors at once, so that a temporary is a whole model."""
    theta = list(model.parameters())
    theta_0 = [parameter.detach().float().clone() for parameter in theta]
    ema = [tensor.clone() for tensor in theta_0]
    average = list(copy.deepcopy(model).parameters())

    @torch.no_grad()
    def update() -> None:
        now = [parameter.detach().float() for parameter in theta]
        torch._foreach_mul_(ema, 1 - BETA)
        torch._foreach_add_(ema, now, alpha=BETA)
        corrections = [tensor.clone() for tensor in now]
        torch._foreach_sub_(corrections, theta_0)
        torch._foreach_mul_(corrections, ALPHA)
        torch._foreach_add_(corrections, ema)
        for result, value in zip(average, corrections, strict=True):
            result.copy_(value)

    return Kept(update, lambda: average)


EMA_RULE = EMA(ConstantDecay(BETA))
BEMA_RULE = BEMA(ConstantDecay(ALPHA), ConstantDecay(BETA))

OURS = [
    ours('EMA', EMA_RULE, 'ema'),
    ours('EMA, no guard', EMA_RULE, 'ema', 'ignore'),
    ours('BEMA', BEMA_RULE, 'bema'),
    ours('BEMA, no guard', BEMA_RULE, 'bema', 'ignore'),
]
OURS_BY_TORCH_ALONE = [by_torch_alone(method) for method in OURS if 'no guard' not in method.name]
OUR_OTHERS = [
    ours('OUEMA', OUEMA(ConstantDecay(ALPHA), ConstantDecay(BETA)), 'other'),
    ours('DEMA', DEMA(ConstantDecay(BETA)), 'other'),
    ours('LAWA, window 4', Window(4), 'other'),
    ours('SWA window', SWAWindow(100), 'other'),
]


def others() -> list[Method]:
    """The averages of others; diffusers' where it is installed."""
    has_diffusers = importlib.util.find_spec('diffusers') is not None
    return [
        Method('Composer EMA', 'ema', keep_composers),
        Method(
            'torch AveragedModel, multi_avg_fn',
            'ema',
            lambda model: keep_averaged_model(model, multi_avg_fn=get_ema_multi_avg_fn(1 - BETA)),
        ),
        Method(
            'torch AveragedModel, avg_fn',
            'ema',
            lambda model: keep_averaged_model(model, avg_fn=get_ema_avg_fn(1 - BETA)),
        ),
        *([Method('diffusers EMAModel', 'ema', keep_diffusers)] if has_diffusers else []),
        Method('TRL BEMACallback', 'bema', keep_trls),
        Method("the paper's reference", 'bema', keep_references, copies=5),
    ]
