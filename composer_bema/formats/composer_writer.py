# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Composer checkpoints of a model alone: what ``load_path`` takes with ``load_weights_only=True``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from composer_bema.averaging.saving import MODEL_HOLDS
from composer_bema.formats.composer import Checkpoint
from composer_bema.formats.entries import ENTRY
from composer_bema.formats.pretrained import read_safetensors
from composer_bema.formats.safetensors_files import SafetensorsFiles
from composer_bema.formats.tensors import TensorSpec

__all__ = ['ComposerWriter']


class ComposerWriter:
    """Writes a monolithic checkpoint with other weights than the one that it is like, and without an optimizer.

    Args:
        folder (Path): Where it is written, under the name of the checkpoint that it is like.
        like (Checkpoint): The checkpoint whose timestamp and configuration it has.
        specs (Mapping[str, TensorSpec]): The weights by the names of its model.
        model_holds (str): What the weights are: the class of an average, or ``'training'``.
    """

    def __init__(self, folder: Path, like: Checkpoint, specs: Mapping[str, TensorSpec], model_holds: str) -> None:
        # As the checkpoint is called, which may be compressed, or a folder of shards.
        self._path = folder / f'{like.path.name.partition("-rank0.pt")[0]}-rank0.pt'
        self._like = like
        self._model_holds = model_holds
        self._names = list(specs)
        # torch.save wants all tensors in memory, and for that a file that is mapped is as good.
        self._scratch = folder / 'weights.safetensors'
        self._files = SafetensorsFiles(folder, specs, self._scratch.stem, max_shard_size=None)

    def create(self) -> None:
        self._files.create()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        self._files.write(name, start, values)

    def finish(self) -> None:
        weights = read_safetensors(self._scratch)
        state: dict[str, Any] = {
            'model': {name: weights[name].read() for name in self._names},
            'callbacks': {ENTRY: {MODEL_HOLDS: self._model_holds}},
        }
        if self._like.timestamp is not None:
            state['timestamp'] = self._like.timestamp
        if self._like.huggingface is not None:
            state['integrations'] = {'huggingface': self._like.huggingface}
        try:
            torch.save({'state': state}, self._path)
        except RuntimeError as error:
            # What torch makes of a full disk: it speaks of positions in its archive.
            raise OSError(f"'{self._path}' cannot be written, which may be for want of room: {error}") from error
        self._scratch.unlink()

    def close(self) -> None:
        self._files.close()
