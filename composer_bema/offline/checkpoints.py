# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The checkpoints of one run, in any format that we read: found, put in order, and opened with the same tensors."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from composer_bema.formats.completeness import INCOMPLETE
from composer_bema.formats.composer import MODEL, TRAINING, Checkpoint, NoComposerCheckpoint, open_checkpoint
from composer_bema.formats.dcp import METADATA, read_model
from composer_bema.formats.huggingface import PREFIX
from composer_bema.formats.manifest import MANIFEST, WEIGHTS, read_manifest
from composer_bema.formats.pretrained import (
    Pretrained,
    find_pretrained,
    is_pretrained,
    open_pretrained,
    read_safetensors,
)
from composer_bema.formats.tensors import LazyTensor

__all__ = ['Found', 'Source', 'find_checkpoints', 'open_initial_model', 'open_sources']

# The names that transformers, GPT-NeoX, llm-foundry and Composer give the checkpoints of a run.
_FOLDER = re.compile(r'(?:checkpoint-|step[-_]?|(?:ep\d+-)?ba)(?P<step>\d+)')
_FILE = re.compile(
    r'ep\d+-ba(?P<batch>\d+)-rank0\.pt(?:\.(?:bz2|gz|lz4|lzma|lzo|tar|tgz|xz|zst))*|(?!.*-\d+-of-\d+\.).*[-_](?P<step>\d+)\.safetensors'
)


@dataclass(frozen=True)
class Found:
    """A checkpoint that has not been opened yet, and the optimizer steps that its name says."""

    step: int
    path: Path


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Args:
        step (int): The optimizer steps done.
        path (Path): The file or folder.
        tensors (Mapping[str, LazyTensor]): Its weights.
        model (Pretrained | Checkpoint, optional): What else it says of its model; None for bare safetensors.
        weights (str, optional): Which of a Composer checkpoint's weights these are; None for other formats.
    """

    step: int
    path: Path
    tensors: Mapping[str, LazyTensor]
    model: Optional[Union[Pretrained, Checkpoint]] = None
    weights: Optional[str] = None

    @property
    def size(self) -> int:
        """The bytes of its files."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.rglob('*') if file.is_file())


def find_checkpoints(folder: Union[str, Path]) -> list[Found]:
    """Returns the checkpoints in a directory, by their steps.

    These are Hugging Face folders ``checkpoint-N``, ``stepN`` or ``baN``, Composer's files ``epE-baN-rank0.pt`` and
    folders ``epE-baN`` of sharded checkpoints, and files ``NAME-N.safetensors``.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If there are no checkpoints in it, or two of the same step.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No such directory of checkpoints: '{folder}'.")
    found: dict[int, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        match = (_FOLDER if entry.is_dir() else _FILE).fullmatch(entry.name)
        path = Path(entry.path)
        if match is None or entry.name.endswith(INCOMPLETE) or _leads_back(path, folder):
            continue
        step = int(next(filter(None, match.groups())))
        if step in found:
            raise ValueError(
                f"'{found[step]}' and '{path}' are both of step {step}: move one of them out of '{folder}'."
            )
        found[step] = path
    if not found:
        what = 'is one checkpoint, not a directory of them' if _is_checkpoint(folder) else 'holds no checkpoints'
        raise ValueError(
            f"'{folder}' {what}; their names look like checkpoint-100, step100, ep0-ba100-rank0.pt, ep0-ba100 or "
            'model-100.safetensors.'
        )
    return [Found(step, path) for step, path in sorted(found.items())]


def open_sources(found: Iterable[Found], weights: str = TRAINING) -> list[Source]:
    """Opens checkpoints, of which tensors are read when they are asked for.

    Args:
        found (Iterable[Found]): The checkpoints; all have to be of the same model.
        weights (str): Of Composer checkpoints the ``'training'`` weights, wherever these are, or what the ``'model'``
            holds. Default: ``'training'``.

    Raises:
        ValueError: If one is damaged, holds an average, or has other tensors than the last one.
    """
    sources = [_open(checkpoint, weights) for checkpoint in found]
    for source in sources:
        _refuse_average(source, weights)
    for source in sources[:-1]:
        _require_same_tensors(source, sources[-1])
    return sources


def open_initial_model(name: str, like: Source) -> Source:
    """Opens the weights before the first step, which may be an average of an earlier run.

    Of a Composer checkpoint it is what the model holds, as in a run that has loaded its weights only.

    Args:
        name (str): A folder or a file of one of the formats, or the name of a model on the Hugging Face hub.
        like (Source): A checkpoint of the run, whose names of tensors are used.

    Raises:
        FileNotFoundError: If there is no such file, folder or model.
        ValueError: If it is of another model.
    """
    path = Path(name)
    local = path if path.is_file() or path.is_dir() else find_pretrained(name)
    source = _open(Found(0, local), MODEL)
    renamed = dataclasses.replace(source, tensors=_renamed(source, like))
    _require_same_tensors(renamed, like)
    return renamed


def _open(found: Found, weights: str) -> Source:
    path = found.path
    if path.is_dir() and is_pretrained(path):
        pretrained = open_pretrained(path)
        return Source(found.step, path, pretrained.weights, pretrained)
    if path.suffix == '.safetensors':
        tensors = read_safetensors(path)
        if not tensors:
            raise ValueError(f"'{path}' cannot be read as weights: it holds no tensors; use another checkpoint.")
        return Source(found.step, path, tensors)
    if path.is_dir() and not (path / METADATA).is_file() and not any(path.glob('*.distcp')):
        raise ValueError(f"'{path}' holds no weights: it is neither a Hugging Face folder nor a sharded checkpoint.")
    try:
        checkpoint = open_checkpoint(path)
    except NoComposerCheckpoint:
        if not path.is_dir():
            raise
        return Source(found.step, path, _read_sharded(path))
    return Source(found.step, path, checkpoint.weights(weights), checkpoint, weights)


def _read_sharded(folder: Path) -> dict[str, LazyTensor]:
    try:
        tensors = read_model(folder)
    except ValueError as error:
        raise ValueError(f"'{folder}' cannot be read as a checkpoint: {error}.") from error
    if not tensors:
        raise ValueError(f"'{folder}' holds no tensors of a model.")
    return tensors


def _refuse_average(source: Source, weights: str) -> None:
    manifest = read_manifest(source.path)
    if manifest is not None and manifest[WEIGHTS] != TRAINING:
        raise ValueError(
            f"'{source.path}' holds the {manifest[WEIGHTS]} weights, as its {MANIFEST} says, and an average of "
            'averages is hardly what you want: move it out of the directory.'
        )
    if weights == MODEL and isinstance(source.model, Checkpoint) and source.model.model_holds != TRAINING:
        raise ValueError(
            f"The model in '{source.path}' holds the {source.model.model_holds} weights, and an average of averages is "
            "hardly what you want: leave the choice of weights at 'training'."
        )


def _renamed(initial: Source, like: Source) -> dict[str, LazyTensor]:
    """Returns an initial model's tensors under the names that a run's have, of which tied ones may be fewer or more."""
    with_prefix = {PREFIX + name: tensor for name, tensor in initial.tensors.items()}
    without_prefix = {name.removeprefix(PREFIX): tensor for name, tensor in initial.tensors.items()}
    wanted = like.tensors
    tensors = max(initial.tensors, with_prefix, without_prefix, key=lambda renamed: len(renamed.keys() & wanted.keys()))
    common = [name for name in tensors if name in wanted]
    renamed = {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or not _has_ties_once(like) or _tied_name(name, common, tensors) is None
    }
    if _has_ties_once(initial):
        first = {name: _tied_name(name, common, wanted) for name in wanted if name not in tensors}
        renamed |= {name: tensors[first_name] for name, first_name in first.items() if first_name is not None}
    # In the run's own precision, with which it started.
    return {name: tensor.to(wanted[name].dtype) if name in wanted else tensor for name, tensor in renamed.items()}


def _has_ties_once(source: Source) -> bool:
    """Returns whether its format has a tied parameter under one name, as Hugging Face folders have, or under all."""
    return isinstance(source.model, Pretrained) or source.path.suffix == '.safetensors'


def _tied_name(name: str, others: Iterable[str], tensors: Mapping[str, LazyTensor]) -> Optional[str]:
    """Returns the first of other names that is the same parameter's, or None.

    That two are one is not written anywhere. Their values tell, unless they are what two layers may well start from, as
    biases and scales do.
    """
    tensor = tensors[name]
    if len(tensor.shape) < 2 or tensor.is_constant():
        return None
    return next((other for other in others if tensors[other].equals(tensor)), None)


def _require_same_tensors(source: Source, last: Source) -> None:
    for name, tensor in last.tensors.items():
        other = source.tensors.get(name)
        if other is None:
            raise ValueError(f"'{source.path}' lacks the tensor '{name}', which '{last.path}' has.")
        if other.shape != tensor.shape:
            raise ValueError(
                f"The tensor '{name}' has the shape {tuple(other.shape)} in '{source.path}', but {tuple(tensor.shape)} "
                f"in '{last.path}'."
            )
        if other.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(
                f"The tensor '{name}' is {other.dtype} in '{source.path}', but {tensor.dtype} in '{last.path}'."
            )
    extra = next((name for name in source.tensors if name not in last.tensors), None)
    if extra is not None:
        raise ValueError(f"'{source.path}' has a tensor '{extra}', which '{last.path}' lacks.")


def _leads_back(path: Path, folder: Path) -> bool:
    """Returns whether it is a link to another entry of the directory, such as Composer's to the latest checkpoint."""
    # Of one step, for the other entry may be a link, too.
    return path.is_symlink() and (folder / os.readlink(path)).parent.resolve() == folder.resolve()


def _is_checkpoint(folder: Path) -> bool:
    return is_pretrained(folder) or (folder / METADATA).is_file()
