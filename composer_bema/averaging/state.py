# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The buffers of one model under one rule: snapshot, update, swap into the model and back, save and load."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
import torch.distributed

from composer_bema.averaging import kernels
from composer_bema.averaging.decay import require_number
from composer_bema.averaging.digests import digests_of
from composer_bema.averaging.keeping import (
    buffer_dtype,
    is_inexact,
    kept_copy,
    kept_snapshot,
    narrow_dtype,
    parse_device,
    parse_folder,
    why_not_kept,
)
from composer_bema.averaging.offload import Update, Updater
from composer_bema.averaging.parameters import (
    canonical_names,
    first_names,
    local_tensor,
    matching_tensors,
    named_parameters,
    named_persistent_buffers,
    named_tensors,
    names_kept_out,
    parameter_shards,
)
from composer_bema.averaging.rules import Latest, Rule
from composer_bema.averaging.saving import (
    BUFFERS,
    DIGESTS,
    LAYOUT,
    MODEL_HOLDS,
    SHAPES,
    TRAINING_WEIGHTS,
    TensorGroups,
    flat_shards,
    loaded_tensors,
    shapes_of,
)
from composer_bema.averaging.sharding import FlatShard, Shard, gather, share, sum_over_ranks
from composer_bema.averaging.signals import uninterrupted
from composer_bema.averaging.swapping import Swap, holds_an_average

__all__ = ['AverageState', 'NonFinite']

NonFinite = Literal['raise', 'skip', 'ignore']


@dataclass
class _Group:
    """The tensors that share a rule. ``buffers`` maps a buffer's name to its tensors by canonical name."""

    rule: Rule
    buffers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def average(self) -> dict[str, torch.Tensor]:
        return self.buffers[self.rule.average]


class AverageState:
    """The average of one model's weights under one rule.

    Trainable parameters are averaged under the rule, once if tied. Persistent floating-point module buffers follow the
    rule's EMA part, which never corrects a bias; integer ones are copied. Buffers are kept in fp32 (fp64 for fp64
    weights), whatever the model's dtype, except those that hold weights as they were: in 16 bits when that loses
    nothing, or in the model's dtype.

    Args:
        rule (Rule): The average.
        average_buffers (bool): Whether floating-point module buffers are averaged. If not, they are copied at every
            update. Default: ``True``.
        nonfinite (str): What an update does about a NaN or an infinity in the weights: ``'raise'`` an error that names
            the parameter and the step, ``'skip'`` the update and count it, or ``'ignore'`` it, which saves a read of
            the weights. The average stays as it was in the first two. All ranks decide alike, in one all-reduce of a
            number where torch.distributed is initialised, so every rank has to update. Default: ``'raise'``.
        device (torch.device | str, optional): Where the buffers live. ``None`` keeps each beside its parameter. With
            ``'cpu'`` and weights on a GPU an update copies these to pinned memory, once more in their dtype, and a
            thread of its own goes on from there; whatever uses the buffers waits for it.
        snapshot_folder (Path | str, optional): Where the rule's snapshots live on disk, in files that are gone with the
            process. ``None`` keeps them with the other buffers.

    Attributes:
        num_updates (int): The updates done, with the one that may be under way.
        num_skipped (int): The updates skipped for a non-finite weight.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        average_buffers: bool = True,
        nonfinite: NonFinite = 'raise',
        device: Optional[Union[torch.device, str]] = None,
        snapshot_folder: Optional[Union[Path, str]] = None,
    ) -> None:
        if nonfinite not in ('raise', 'skip', 'ignore'):
            raise ValueError(f"nonfinite must be 'raise', 'skip' or 'ignore', but is {nonfinite!r}.")
        self.rule = rule
        self.average_buffers = average_buffers
        self.nonfinite = nonfinite
        self.device = parse_device(device)
        self.snapshot_folder = parse_folder(snapshot_folder)
        self.num_updates = 0
        self.num_skipped = 0
        self._updater = Updater()
        self._unawaited_groups: list[_Group] = []
        self._shards: dict[str, Shard] = {}
        self._swap: Optional[Swap] = None

    @property
    def started(self) -> bool:
        """Whether the buffers have been taken."""
        return bool(self._unawaited_groups)

    @property
    def swapped(self) -> bool:
        """Whether a model holds the average while its training weights rest here."""
        return self._swap is not None

    def __getstate__(self) -> dict[str, Any]:
        """Waits, for copies and pickles."""
        self._updater.wait()
        return self.__dict__.copy()

    def change_rule(self, rule: Rule) -> None:
        """Goes on with the same buffers under another rule of the same kind."""
        self.rule = rule
        for group, changed in zip(self._groups, (rule, rule.statistics), strict=False):
            group.rule = changed

    def start(self, model: torch.nn.Module) -> None:
        """Takes every buffer, theta_0 included, from the weights of ``model``.

        Raises:
            RuntimeError: If the model holds an average.
            TypeError: If it is no module.
            ValueError: If it has no trainable parameters, or a parameter or persistent module buffer that is sparse,
                quantized, expanded or of a dtype that is not averaged.
        """
        self._require_training_weights('start', model)
        averaged = self._averaged_tensors(model)
        if not averaged[0][1]:
            raise ValueError('The model has no trainable parameters, so there is nothing to average.')
        self._shards = parameter_shards(model)
        self._take_groups(
            [
                _Group(rule, {name: self._new_buffer(name, rule, tensors) for name in rule.buffers})
                for rule, tensors in averaged
            ]
        )
        self.num_updates = self.num_skipped = 0

    def update(self, model: torch.nn.Module, step: int, elapsed: float = 1.0) -> Optional[Mapping[str, float]]:
        """Brings the average up to the weights of ``model``.

        Args:
            model (torch.nn.Module): The model, holding its training weights.
            step (int): t, the optimizer steps done since the start of the run.
            elapsed (float): The time since the previous update, in the unit of the half-life.

        Returns:
            Mapping[str, float]: The coefficients of the update, or None if it was skipped.

        Raises:
            FloatingPointError: If a weight is not finite and ``nonfinite='raise'``.
            RuntimeError: If the buffers have not been taken, the model holds an average, or an update has failed.
            TypeError: If ``elapsed`` is no number.
            ValueError: If a parameter has become trainable since, or an averaged one is gone, or if ``elapsed`` is
                negative or not finite.
        """
        require_number('elapsed', elapsed)
        self._require_start()
        self._require_training_weights('update', model)
        theta = self._tensors_to_average(named_tensors(model))
        if self.nonfinite != 'ignore' and not self._all_finite(theta, step):
            self.num_skipped += 1
            return None
        updates = [
            Update(
                group.rule.linear_step(step, elapsed, self.num_updates),
                list(tensors.values()),
                {name: [kept[n] for n in tensors] for name, kept in group.buffers.items()},
            )
            for group, tensors in zip(self._groups, theta, strict=True)
        ]
        # Half an update would pass for a whole one.
        with uninterrupted():
            self._updater.apply(updates)
            self.num_updates += 1
        return updates[0].step.coefficients

    def average(self) -> dict[str, torch.Tensor]:
        """Returns the averaged tensors by canonical name: the state's own memory, or the model's while swapped.

        The next update may go on writing to them after it has returned, so ask again after each.
        """
        return self._kept_average() if self._swap is None else self._swap.average()

    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Returns a copy of the state dict of ``model`` with the average in it, by canonical name, in its dtypes.

        Of a sharded model the tensors are whole and in host memory, and rank 0 alone gets them; the others get an
        empty dict.
        """
        self._require_update()
        average, first = self.average(), first_names(model)
        if self._shards:
            wholes = self._gathered_average(model)
            return {n: wholes[name] for n, name in first.items() if name in wholes}
        state = model.state_dict()
        averaged = {}
        for n, value in zip(canonical_names(model, list(state)), state.values(), strict=True):
            averaged[n] = value
            if isinstance(value, torch.Tensor):
                averaged[n] = average.get(first.get(n, n), value).to(value, copy=True)
        return averaged

    @torch.no_grad()
    def copy_to(self, model: torch.nn.Module) -> None:
        """Overwrites the averaged tensors of ``model`` with the average, rounded once to the model's dtypes.

        Raises:
            RuntimeError: If there was no update yet.
            ValueError: If the model lacks an averaged tensor or has it in another shape.
        """
        self._require_update()
        self._copy(self.average(), model)

    @torch.no_grad()
    def copy_training_weights_to(self, model: torch.nn.Module) -> None:
        """Overwrites the averaged tensors of ``model`` with the training weights that rest here while swapped."""
        if self._swap is None:
            raise RuntimeError('The training weights are in the model that is being trained, not here.')
        self._copy(self._swap.training_weights(), model)

    def swap_in(self, model: torch.nn.Module) -> None:
        """Puts the average into ``model``, to be taken out again by :meth:`swap_out`."""
        self._require_start()
        self._require_training_weights('swap_in', model)
        self._swap = Swap(model, self._kept_average())
        try:
            self._swap.put_in()
        except BaseException:
            self.swap_out()
            raise

    def swap_out(self) -> None:
        """Puts the training weights back, bit for bit. Does nothing if they are in the model already."""
        if self._swap is not None:
            self._swap.take_out()
            self._swap = None

    @contextlib.contextmanager
    def applied_to(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Holds the average in ``model`` for a block, and puts the training weights back whatever happens inside.

        Before the first update there is no average, and the block sees the training weights.

        Example:
            >>> with state.applied_to(model):
            ...     evaluate(model)
        """
        if self.num_updates:
            self.swap_in(model)
        try:
            yield model
        finally:
            self.swap_out()

    def distance(self, model: torch.nn.Module) -> float:
        """Returns the Euclidean distance between the average and the training weights in ``model``, parameters only."""
        self._require_start()
        self._require_training_weights('distance', model)
        average = self._groups[0].average
        live = matching_tensors(average, named_tensors(model))
        whole = [n for n in live if n not in self._shards]
        distance = kernels.distance([live[n] for n in whole], [average[n] for n in whole])
        if not self._shards:
            return distance
        held = [n for n in live if n in self._shards and self._shards[n].is_first_replica]
        local = kernels.distance([live[n] for n in held], [average[n] for n in held])
        [squares] = sum_over_ranks([local**2], next(iter(live.values())).device)
        return math.hypot(distance, math.sqrt(squares))

    def share_module_buffers(self) -> None:
        """Gives every rank the averages of module buffers that rank 0 has: statistics are of each rank's own data.

        Every rank has to call it.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            share([tensor for group in self._groups[1:] for tensor in group.average.values()])

    def state_dict(self) -> dict[str, Any]:
        """Returns the buffers, their digests and the counters: tensors, numbers and strings, without copying a tensor.

        While swapped the training weights are part of it, and of the average only what the model does not hold bit for
        bit: the model's own state dict has to be saved beside it. Sharded tensors are `FlatShard`, which
        ``torch.distributed.checkpoint`` saves and loads.
        """
        everything = self._tensors()
        state = {
            'num_updates': self.num_updates,
            'num_skipped': self.num_skipped,
            LAYOUT: dict(self.rule.layout),
            SHAPES: shapes_of(everything),
            DIGESTS: digests_of(everything),
        }
        if self._swap is None:
            return {**state, MODEL_HOLDS: 'training', BUFFERS: everything}
        tensors = self._tensors(omitted=self._swap.in_model)
        training_weights = tensors.pop(TRAINING_WEIGHTS)
        return {**state, MODEL_HOLDS: 'average', BUFFERS: tensors, TRAINING_WEIGHTS: training_weights}

    def load_state_dict(self, state: Mapping[str, Any], model: torch.nn.Module) -> None:
        """Restores what :meth:`state_dict` returned, and puts the training weights into ``model`` if it says so.

        Args:
            state (Mapping[str, Any]): The saved state. Its tensors are copied; they are whole, or this rank's shards.
            model (torch.nn.Module): The model, under any wrapping, holding the weights saved beside the state.

        Raises:
            ValueError: If a buffer, a tensor's name or a shape is missing, unexpected or different, values are not
                those that were saved, or the rule lays out its buffers in another way. Nothing is changed then.
        """
        self._require_training_weights('load_state_dict', model)
        # What was saved may be this state's own memory.
        self._updater.settle()
        self._require_layout(state)
        counters = state['num_updates'], state['num_skipped']
        tensors = loaded_tensors(state, model)
        training_weights = tensors.pop(TRAINING_WEIGHTS, {})
        groups = self._loaded_groups(tensors, model) if tensors else []
        with torch.no_grad():
            self._copy(training_weights, model)
        self._take_groups(groups)
        self._shards = parameter_shards(model)
        self.num_updates, self.num_skipped = counters

    @property
    def _groups(self) -> list[_Group]:
        """The buffers, which nothing is writing to any more: every use of them passes here."""
        self._updater.wait()
        return self._unawaited_groups

    def _take_groups(self, groups: list[_Group]) -> None:
        self._updater.forget()
        self._unawaited_groups = groups

    def _averaged_tensors(self, model: torch.nn.Module) -> list[tuple[Rule, dict[str, torch.Tensor]]]:
        """Returns the tensors of ``model`` by the rule that they fall under; the parameters come first."""
        parameters = {n: local_tensor(p) for n, p in named_parameters(model).items() if p.requires_grad}
        kept_out = names_kept_out(model)
        buffers = {n: local_tensor(b) for n, b in named_persistent_buffers(model).items() if n not in kept_out}
        statistics = {n: b for n, b in buffers.items() if self.average_buffers and is_inexact(b)}
        copied = {n: b for n, b in buffers.items() if n not in statistics}
        for n, tensor in {**parameters, **buffers}.items():
            reason = why_not_kept(tensor, is_averaged=n not in copied)
            if reason is not None:
                raise ValueError(
                    f"'{n}' {reason}, of which there is no average: make it a dense tensor of floats or integers, or a "
                    'buffer with persistent=False.'
                )
        return [(self.rule, parameters), (self.rule.statistics, statistics), (Latest(), copied)]

    @torch.no_grad()
    def _new_buffer(self, name: str, rule: Rule, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns copies of ``tensors`` as a buffer keeps them."""
        if name in rule.snapshots:
            return {n: kept_snapshot(t, t.dtype, t, self.device, self.snapshot_folder) for n, t in tensors.items()}
        narrow = self._fit_in_16_bits(tensors) if name in rule.constants else {}
        return {n: kept_copy(t, narrow.get(n, buffer_dtype(t)), t, self.device) for n, t in tensors.items()}

    def _fit_in_16_bits(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
        """Returns the dtypes of those tensors that 16 bits hold exactly: on all ranks, or shards would not fit."""
        candidates = {n: t for n, t in tensors.items() if t.is_floating_point()}
        loses = [int(not kernels.is_exact_in(t, narrow_dtype(t))) for t in candidates.values()]
        if self._shards and candidates:
            loses = sum_over_ranks(loses, next(iter(candidates.values())).device)
        return {n: narrow_dtype(t) for (n, t), lossy in zip(candidates.items(), loses, strict=True) if not lossy}

    def _tensors(self, omitted: Collection[str] = ()) -> TensorGroups:
        """Returns every tensor of the state as it is saved, by the buffer's name, without the averages ``omitted``."""
        average = self.average()
        tensors: TensorGroups = {}
        for group in self._groups:
            for name, kept in group.buffers.items():
                if name == group.rule.average:
                    kept = {n: average[n] for n in kept if n not in omitted}
                tensors.setdefault(name, {}).update(flat_shards(kept, self._shards))
        if self._swap is not None:
            tensors[TRAINING_WEIGHTS] = flat_shards(self._swap.training_weights(), self._shards)
        return tensors

    def _gathered_average(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Returns all tensors of a sharded model, whole, with the average among them; on rank 0 only."""
        average = self.average()
        live = {n: local_tensor(tensor) for n, tensor in named_tensors(model).items()}
        values = flat_shards({n: average.get(n, t).to(t.dtype) for n, t in live.items()}, self._shards)
        wholes = gather({n: t for n, t in values.items() if isinstance(t, FlatShard)})
        if torch.distributed.get_rank() != 0:
            return {}
        return {n: wholes[n] if n in wholes else values[n].to('cpu', copy=True) for n in values}

    def _tensors_to_average(self, named: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Returns, a group each, the tensors to update from. A parameter that froze keeps its average if it can."""
        _require_no_newcomers(named, self._groups[0].average)
        parameters, *others = (matching_tensors(group.average, named) for group in self._groups)
        if not self.rule.layout:
            parameters = {n: t for n, t in parameters.items() if named[n].requires_grad}
        return [parameters, *others]

    def _all_finite(self, theta: list[dict[str, torch.Tensor]], step: int) -> bool:
        tensors = {
            n: t
            for group, kept in zip(theta, self._groups, strict=True)
            if not isinstance(kept.rule, Latest)
            for n, t in group.items()
        }
        bad = kernels.first_nonfinite(list(tensors.values()))
        if not _any_rank(bad is not None, next(iter(tensors.values())).device if tensors else torch.device('cpu')):
            return True
        if self.nonfinite == 'raise':
            where = 'a parameter on another rank' if bad is None else f"'{list(tensors)[bad]}'"
            raise FloatingPointError(
                f'After step {step} {where} holds a NaN or an infinity, which would poison the average for ever. The '
                "average is as it was before; nonfinite='skip' leaves such steps out.",
            )
        return False

    def _kept_average(self) -> dict[str, torch.Tensor]:
        return {n: tensor for group in self._groups for n, tensor in group.average.items()}

    def _copy(self, source: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
        for n, tensor in matching_tensors(source, named_tensors(model)).items():
            tensor.copy_(source[n])

    def _loaded_groups(self, saved: Mapping[str, Mapping[str, torch.Tensor]], model: torch.nn.Module) -> list[_Group]:
        named = named_tensors(model)
        for tensors in saved.values():
            matching_tensors(tensors, named)
        (rule, _), *others = self._averaged_tensors(model)
        module_buffers = {n for _, tensors in others for n in tensors}
        lacking = [name for name in rule.buffers if not saved.get(name, {}).keys() - module_buffers]
        if lacking:
            raise ValueError(
                f"The saved average has no buffer '{lacking[0]}', which these settings need: it was saved under "
                f'another rule, with {sorted(saved)}.',
            )
        # A module buffer may have been saved under another rule.
        anywhere = {n: tensor for tensors in saved.values() for n, tensor in tensors.items()}
        # The saved parameters rather than the trainable ones: some may have frozen since.
        parameters = {n: tensor for n, tensor in saved[rule.average].items() if n not in module_buffers}
        for n, tensor in named.items():
            if tensor.requires_grad and n not in parameters:
                raise ValueError(f"The saved average has no tensor '{n}', which the model trains.")
        groups = [_Group(rule, {b: self._restored(b, rule, saved[b], parameters, named) for b in rule.buffers})]
        for other, tensors in others:
            found = {b: {**anywhere, **saved.get(b, {})} for b in other.buffers}
            groups.append(_Group(other, {b: self._restored(b, other, found[b], tensors, named) for b in found}))
        return groups

    @torch.no_grad()
    def _restored(
        self,
        buffer: str,
        rule: Rule,
        saved: Mapping[str, torch.Tensor],
        names: Iterable[str],
        named: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Returns copies of saved tensors as a buffer keeps them."""
        restored = {}
        for n in names:
            if n not in saved:
                raise ValueError(f"The saved average has no tensor '{n}', which the model has.")
            if buffer in rule.snapshots:
                dtype = torch.promote_types(saved[n].dtype, named[n].dtype)
                restored[n] = kept_snapshot(saved[n], dtype, named[n], self.device, self.snapshot_folder)
            else:
                dtype = saved[n].dtype if buffer in rule.constants else buffer_dtype(named[n])
                restored[n] = kept_copy(saved[n], dtype, named[n], self.device)
        return restored

    def _require_layout(self, state: Mapping[str, Any]) -> None:
        saved, wanted = state.get(LAYOUT) or {}, dict(self.rule.layout)
        if state[DIGESTS] and saved != wanted:
            raise ValueError(
                f'The saved average has its buffers laid out for {saved or "another rule"}, and these settings need '
                f'{wanted or "another one"}: go on with the settings that it was saved with.',
            )

    def _require_start(self) -> None:
        if not self.started:
            raise RuntimeError('The average has no buffers yet: call start(model) first.')

    def _require_update(self) -> None:
        if not self.num_updates:
            raise RuntimeError('There was no update yet, so there is no average to give.')

    def _require_training_weights(self, call: str, model: torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f'{call} needs a torch.nn.Module, but the model is a {type(model).__name__}.')
        if self.swapped or holds_an_average(model):
            which = 'the average' if self.swapped else 'another average'
            raise RuntimeError(f'{call} needs the training weights in the model, but {which} is there: swap_out first.')


def _require_no_newcomers(named: Mapping[str, torch.Tensor], averaged: Collection[str]) -> None:
    for n, tensor in named.items():
        if tensor.requires_grad and n not in averaged:
            raise ValueError(
                f"The parameter '{n}' is trainable but has no average: the set of trainable parameters may shrink "
                'during a run, not grow. Let it require gradients before averaging starts, or freeze it.',
            )


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Returns whether the flag is set on any rank: one scalar all-reduce, so that all ranks decide alike."""
    if not torch.distributed.is_initialized():
        return flag
    [votes] = sum_over_ranks([int(flag)], device)
    return votes > 0
