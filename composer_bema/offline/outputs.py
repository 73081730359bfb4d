# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What averages are written as: Hugging Face folders or Composer checkpoints, like those that they were made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Optional, Union

import torch

from composer_bema.formats.composer import Checkpoint
from composer_bema.formats.composer_writer import ComposerWriter
from composer_bema.formats.huggingface import WeightsWriter, pretrained_writer
from composer_bema.formats.pretrained import CONFIG, Pretrained, copy_companions, read_config
from composer_bema.formats.safetensors_files import MAX_SHARD_SIZE, SafetensorsFiles, write_json
from composer_bema.formats.tensors import TensorSpec, main_dtype
from composer_bema.offline.checkpoints import Source

__all__ = ['Format', 'MemoryWriter', 'weights_writer']

Format = Literal['huggingface', 'composer']

_ADAPTER = 'adapter_model'


def weights_writer(
    folder: Path,
    like: Source,
    specs: Mapping[str, TensorSpec],
    model_holds: str,
    *,
    format: Optional[Format] = None,
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
) -> WeightsWriter:
    """Returns what writes an average of checkpoints.

    Args:
        folder (Path): An empty folder.
        like (Source): The checkpoint whose configuration, tokenizer and timestamp it has.
        specs (Mapping[str, TensorSpec]): The weights by the checkpoint's names.
        model_holds (str): The class of the average.
        format (str, optional): ``'huggingface'`` or ``'composer'``. Default: the former, unless the checkpoints are
            Composer's of another model.
        max_shard_size (int | str): The size at which another file of weights begins, in Hugging Face folders.

    Raises:
        ValueError: If the checkpoint cannot be written in this format.
    """
    if not isinstance(like.model, Checkpoint):
        if format == 'composer':
            raise ValueError(f"'{like.path}' is no checkpoint of Composer, of which one in its format could be made.")
        return _FolderWriter(folder, like, specs, max_shard_size)
    entry = like.model.huggingface
    if format == 'composer' or (format is None and not entry):
        return ComposerWriter(folder, like.model, specs, model_holds)
    if not entry:
        raise ValueError(f"The model in '{like.path}' is not a HuggingFaceModel of Composer: write format='composer'.")
    return pretrained_writer(folder, entry, specs, source=str(like.path), max_shard_size=max_shard_size)


class MemoryWriter:
    """Keeps weights in memory.

    Args:
        specs (Mapping[str, TensorSpec]): The weights.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Takes the values of a tensor from the element ``start`` on."""
        self.weights[name].view(-1)[start : start + values.numel()] = values


class _FolderWriter:
    """Writes a folder like another Hugging Face folder, or of weights alone."""

    def __init__(
        self, folder: Path, like: Source, specs: Mapping[str, TensorSpec], max_shard_size: Union[int, str]
    ) -> None:
        self._folder = folder
        self._like = like.model if isinstance(like.model, Pretrained) else None
        # PEFT reads a single file.
        is_adapter = self._like is not None and self._like.stem == _ADAPTER
        stem, size = (_ADAPTER, None) if is_adapter else ('model', max_shard_size)
        self._files = SafetensorsFiles(folder, specs, stem, size)
        self._dtype = main_dtype(specs.values())

    def create(self) -> None:
        if self._like is not None:
            copy_companions(self._like.folder, self._folder)
            self._say_dtype(self._like.folder / CONFIG)
        self._files.create()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        self._files.write(name, start, values)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._files.close()

    def _say_dtype(self, source: Path) -> None:
        """Corrects the dtype in a configuration, under the name that its version of transformers gave it."""
        if source.is_file() and self._dtype is not None:
            config = read_config(source)
            key = 'dtype' if 'dtype' in config else 'torch_dtype'
            write_json(self._folder / CONFIG, {**config, key: str(self._dtype).removeprefix('torch.')})
