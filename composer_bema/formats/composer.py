# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Composer checkpoints, monolithic and sharded: the model's tensors, those of its averages, one by one when asked for.

Reading executes nothing of what a checkpoint holds, needs no Composer, and checks every tensor of ours against the
digest that was written with it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

import torch

from composer_bema.averaging.digests import digest
from composer_bema.averaging.saving import BUFFERS, DIGESTS, MODEL_HOLDS, SHAPES, TRAINING_WEIGHTS
from composer_bema.formats.completeness import saved_checkpoints, why_incomplete
from composer_bema.formats.compression import uncompressed
from composer_bema.formats.dcp import plain, read_folder
from composer_bema.formats.entries import ENTRY, HEADER, read_header
from composer_bema.formats.tensors import LazyTensor
from composer_bema.formats.unpickling import load_archive

__all__ = ['AVERAGE', 'MODEL', 'TRAINING', 'Checkpoint', 'NoComposerCheckpoint', 'SavedAverage', 'open_checkpoint']

# Weights to ask for, beside the buffers of an average by their names.
AVERAGE = 'average'
TRAINING = 'training'
MODEL = 'model'

# Where module buffers are. Parameters may be there too, and are looked up in the average's own buffer after these.
_BUFFERS_OF_MODULES = ('latest', 'ema')


class NoComposerCheckpoint(ValueError):
    """What was opened is whole, but another trainer has written it."""


def open_checkpoint(path: Union[str, Path]) -> Checkpoint:
    """Opens a checkpoint of Composer; tensors are read when they are asked for.

    Args:
        path (str | Path): A file, compressed or not, or the folder of a sharded checkpoint, or a link to either.

    Raises:
        FileNotFoundError: If there is nothing, or a link to nothing.
        NoComposerCheckpoint: If another trainer has written it; a ValueError.
        ValueError: If it is cut or damaged.
    """
    path = Path(path)
    _require_checkpoint(path)
    with uncompressed(path) as source:
        problem = why_incomplete(source)
        if problem:
            _refuse(path, problem)
        try:
            nest = read_folder(source) if source.is_dir() else load_archive(source)
        except ValueError as error:
            _refuse(path, str(error), error)
    if not isinstance(nest, Mapping) or not isinstance(nest.get('state'), Mapping) or not nest['state'].get('model'):
        raise NoComposerCheckpoint(f"'{path}' is no checkpoint of Composer: it holds no state of a model.")
    return Checkpoint(path, nest['state'])


class Checkpoint:
    """What a checkpoint of Composer holds.

    Weights are dicts of `LazyTensor` by the names of the checkpoint's model, in its order.

    Args:
        path (Path): The checkpoint, for messages.
        state (Mapping[str, Any]): Its ``state``, in which tensors may be `LazyTensor` and other values `LazyValue`.
    """

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        self.path = path
        self._state = state
        self._fingerprints: dict[str, int] = {}
        entries = _child(state, 'callbacks', ENTRY) or {}
        self.model = {name: _lazy(leaf) for name, leaf in state['model'].items() if _is_tensor(leaf)}
        self.model_holds = str(plain(entries.get(MODEL_HOLDS, TRAINING)))
        self.averages = {
            name: SavedAverage(self, name, entry) for name, entry in entries.items() if isinstance(entry, Mapping)
        }

    @property
    def timestamp(self) -> Optional[dict[str, Any]]:
        """Composer's count of what has been done, or None in a checkpoint of weights only."""
        return plain(self._state.get('timestamp'))

    @property
    def batch(self) -> Optional[int]:
        """The optimizer steps done, or None in a checkpoint of weights only."""
        return plain(_child(self._state, 'timestamp', 'Timestamp', 'batch'))

    @property
    def learning_rates(self) -> tuple[list[float], list[float]]:
        """The learning rates of the next step and those that the schedules multiply, one for each group of parameters.

        Both are empty in a checkpoint without schedules.
        """
        schedulers = plain(self._state.get('schedulers')) or {}
        states = list(schedulers.values())
        return [rate for s in states for rate in s['_last_lr']], [rate for s in states for rate in s['base_lrs']]

    @property
    def huggingface(self) -> Optional[dict[str, Any]]:
        """What Composer keeps of a Hugging Face model's configuration and tokenizer, or None for other models."""
        return plain(_child(self._state, 'integrations', 'huggingface'))

    @property
    def _has_weights_only(self) -> bool:
        return 'timestamp' not in self._state

    @property
    def holds_composers_ema(self) -> bool:
        """Whether the model holds the average of Composer's own EMA."""
        # A checkpoint's algorithms are pairs of a class's name and its state.
        algorithms = dict(plain(self._state.get('algorithms')) or ())
        return isinstance(algorithms.get('EMA'), Mapping) and bool(algorithms['EMA'].get('ema_weights_active'))

    @property
    def average_names(self) -> list[str]:
        """The averages of which there are weights here, by their classes' names."""
        return [*self.averages, *({self.model_holds} - {TRAINING, *self.averages})]

    def weights(self, which: str = AVERAGE, average: Optional[str] = None) -> dict[str, LazyTensor]:
        """Returns one set of weights for the whole model: frozen parameters are in all of them.

        Args:
            which (str): ``'average'``, ``'training'``, ``'model'`` (what the checkpoint's model holds, whichever it
                is), or a buffer of the average such as ``'theta_0'``. Of module buffers no first values are kept;
                beside theta_0 there are averaged ones.
            average (str, optional): The class's name of the average, where a run had several.

        Raises:
            ValueError: If the checkpoint has no such weights. Reading a tensor that is damaged raises one too.
        """
        if which == MODEL:
            return dict(self.model)
        if which == TRAINING:
            changed = self._training_weights()
        else:
            name = self.average_name(average)
            saved = self.averages.get(name)
            if saved is not None:
                changed = saved.weights(which)
            elif which in (AVERAGE, name.lower()):
                changed = {}
            else:
                raise ValueError(
                    f"'{self.path}' has no '{which}' weights: of {name} it holds the average alone, in its model."
                )
        return self._with_tied(changed)

    def _training_weights(self) -> Mapping[str, LazyTensor]:
        if self.model_holds == TRAINING:
            self._require_training_weights_in_model()
            return {}
        saved = self.averages.get(self.model_holds)
        if saved is None:
            raise ValueError(
                f"'{self.path}' has no training weights: its model holds the {self.model_holds} average in their "
                'place; use a checkpoint that has them.'
            )
        return saved.training_weights()

    def _require_training_weights_in_model(self) -> None:
        if self._has_weights_only:
            raise ValueError(
                f"'{self.path}' was saved with save_weights_only, and does not say which weights its model holds: "
                f"ask for the '{MODEL}' weights."
            )
        if self.holds_composers_ema:
            raise ValueError(
                f"The model in '{self.path}' holds the average of Composer's own EMA: ask for the '{MODEL}' "
                'weights if that is what you want.'
            )

    def average_name(self, wanted: Optional[str] = None) -> str:
        """Returns the name of an average of which there are weights here.

        Args:
            wanted (str, optional): It, in whatever case; needed where there are several.

        Raises:
            ValueError: If there is none, or no such one, or none of several was named.
        """
        names = self.average_names
        if not names:
            if self._has_weights_only:
                raise ValueError(f"'{self.path}' was saved with save_weights_only: ask for the '{MODEL}' weights.")
            raise ValueError(
                f"'{self.path}' holds no average, only the '{TRAINING}' weights: its run had none, or kept it out of "
                'checkpoints with state_in_checkpoint=False.'
            )
        if wanted is None and len(names) > 1:
            raise ValueError(f"'{self.path}' holds several averages: say which one of {', '.join(names)}.")
        matching = [name for name in names if wanted is None or name.lower() == wanted.lower()]
        if not matching:
            raise ValueError(f"'{self.path}' holds no average '{wanted}', but {', '.join(names)}.")
        return matching[0]

    def _with_tied(self, changed: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Returns the model's tensors with others in the place of some, under all the names of tied parameters."""
        weights = {**self.model, **changed}
        for name, first in self._tied_names(changed).items():
            weights[name] = weights[first]
        return weights

    def _tied_names(self, averaged: Collection[str]) -> dict[str, str]:
        """Maps further names of averaged parameters to the first ones.

        An average has a tied parameter under its first name, and the model under all. That two are one is not written
        anywhere, but their values are equal to the last bit.
        """
        alike = defaultdict(list)
        for name in averaged:
            if name in self.model:
                alike[self.model[name].shape, self.model[name].dtype].append(name)
        tied = {}
        for name, tensor in self.model.items():
            if name in averaged or not tensor.dtype.is_floating_point:
                continue
            for first in alike.get((tensor.shape, tensor.dtype), ()):
                if self._fingerprint(name) == self._fingerprint(first) and tensor.equals(self.model[first]):
                    tied[name] = first
                    break
        return tied

    def _fingerprint(self, name: str) -> int:
        if name not in self._fingerprints:
            self._fingerprints[name] = digest(next(self.model[name].pieces(4096)))
        return self._fingerprints[name]


class SavedAverage:
    """An average in a checkpoint: the tensors of its buffers, each with its digest.

    Args:
        checkpoint (Checkpoint): Where it is.
        name (str): Its class.
        entry (Mapping[str, Any]): What the checkpoint has under that name.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, entry: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self.name = name
        try:
            self.header = read_header(plain(entry[HEADER]))
            self.average: str = self.header['average']
            self._digests: dict[str, dict[str, int]] = self.header[DIGESTS]
            self._shapes: dict[str, list[int]] = self.header[SHAPES]
            self._is_in_model = self.header[MODEL_HOLDS] == 'average'
        except (KeyError, TypeError, ValueError) as error:
            _refuse(checkpoint.path, f'what it says of its {name} average cannot be read', error)
        self._tensors = {**(entry.get(BUFFERS) or {}), TRAINING_WEIGHTS: entry.get(TRAINING_WEIGHTS) or {}}

    @property
    def buffers(self) -> list[str]:
        """The names of its buffers, the average among them."""
        return [name for name in self._digests if name not in (TRAINING_WEIGHTS, 'latest')]

    def weights(self, which: str) -> dict[str, LazyTensor]:
        """Returns the tensors of a buffer, and for all others that are averaged their average."""
        buffer = self.average if which == AVERAGE else which
        if buffer not in self.buffers:
            raise ValueError(
                f"'{self._checkpoint.path}' has no '{which}' weights: it has the {AVERAGE} of {self.name}, its buffers "
                f'{", ".join(sorted(self.buffers))}, and {TRAINING}.'
            )
        wanted = (*_BUFFERS_OF_MODULES, self.average, buffer)
        return {n: self._tensor(name, n) for name in wanted for n in self._digests.get(name, ())}

    def training_weights(self) -> dict[str, LazyTensor]:
        """Returns the weights in whose place the model holds the average."""
        return {n: self._tensor(TRAINING_WEIGHTS, n) for n in self._digests.get(TRAINING_WEIGHTS, ())}

    def _tensor(self, group: str, n: str) -> LazyTensor:
        leaf = (self._tensors.get(group) or {}).get(n)
        if leaf is None and self._is_in_model and group != TRAINING_WEIGHTS:
            # What the model holds of the average bit for bit is not there a second time.
            leaf = self._checkpoint.model.get(n)
        if leaf is None or not _is_tensor(leaf):
            _refuse(self._checkpoint.path, f"its {self.name} average lacks the tensor '{n}' of {group}")
        tensor = _lazy(leaf)
        shape = torch.Size(self._shapes.get(n, tensor.shape))
        if shape.numel() != tensor.shape.numel():
            _refuse(self._checkpoint.path, f"the tensor '{n}' in {group} of its {self.name} average has another size")
        complaint = _refusal(
            self._checkpoint.path, f"the tensor '{n}' in {group} of its {self.name} average is not what was saved"
        )
        return tensor.reshape(shape).checked(self._digests[group][n], complaint)


def _require_checkpoint(path: Path) -> None:
    if not path.exists():
        if path.is_symlink():
            raise FileNotFoundError(f"'{path}' is a link to '{os.readlink(path)}', which is not there.")
        raise FileNotFoundError(f"No such checkpoint: '{path}'.")
    if path.is_dir() and not any(path.glob('*.distcp')) and not (path / '.metadata').exists():
        found = sorted(saved_checkpoints(path))
        hint = f": name one of those in it, such as '{found[-1].path}'" if found else ''
        raise ValueError(f"The folder '{path}' is no checkpoint{hint}.")


def _refusal(path: Path, problem: str) -> str:
    return f"'{path}' cannot be read as a checkpoint: {problem}; use another one, such as the one saved before it."


def _refuse(path: Path, problem: str, cause: Optional[Exception] = None) -> NoReturn:
    raise ValueError(_refusal(path, problem)) from cause


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, LazyTensor))


def _lazy(leaf: Union[torch.Tensor, LazyTensor]) -> LazyTensor:
    return leaf if isinstance(leaf, LazyTensor) else LazyTensor.of(leaf)


def _child(nest: Any, *path: str) -> Any:
    for name in path:
        nest = nest.get(name) if isinstance(nest, Mapping) else None
    return nest
