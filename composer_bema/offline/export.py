# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A checkpoint's weights, averaged or not, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from composer_bema.formats.composer import AVERAGE, MODEL, TRAINING, Checkpoint, open_checkpoint
from composer_bema.formats.huggingface import new_folder, pretrained_writer, write_weights
from composer_bema.formats.manifest import write_manifest
from composer_bema.formats.safetensors_files import MAX_SHARD_SIZE
from composer_bema.formats.tensors import dtype_named

__all__ = ['export']


def export(
    checkpoint: Union[str, Path],
    out: Union[str, Path],
    *,
    weights: str = AVERAGE,
    average: Optional[str] = None,
    precision: Optional[str] = None,
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
) -> Path:
    """Writes weights of a Composer checkpoint as a folder that ``from_pretrained`` reads.

    Args:
        checkpoint (str | Path): A checkpoint of a Hugging Face model: a file, or a folder of a sharded one.
        out (str | Path): The folder to make. It is there when it is complete, and not before.
        weights (str): ``'average'``, ``'training'``, ``'model'`` (what the checkpoint's model holds, whichever it is),
            or a buffer of the average such as ``'ema'`` or ``'theta_0'``. Default: ``'average'``.
        average (str, optional): The class of the average, such as ``'BEMA'``, where a run had several.
        precision (str, optional): ``'float32'``, ``'bfloat16'``, ``'float16'`` or ``'float64'``. Default: the model's.
        max_shard_size (int | str): The size at which another file of weights begins. Default: ``'5GB'``.

    Returns:
        Path: The folder.

    Raises:
        FileExistsError: If ``out`` is there and is not an empty folder.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint is cut or damaged, has no such weights, or is not of a Hugging Face model.

    Example:
        >>> export('checkpoints/latest-rank0.pt', 'bema')
        >>> model = AutoModelForCausalLM.from_pretrained('bema')
    """
    dtype = dtype_named(precision, 'precision')
    with new_folder(out) as folder:
        opened = open_checkpoint(checkpoint)
        chosen = opened.weights(weights, average)
        entry = opened.huggingface
        if not entry:
            raise ValueError(
                f"The model in '{checkpoint}' is not a HuggingFaceModel of Composer, which export needs; of others "
                "an algorithm's averaged_state_dict() has the average, and stabilize --format composer averages them."
            )
        # An average has been kept in fp32, whatever its model's dtype.
        cast = {n: tensor.to(dtype or opened.model.get(n, tensor).dtype) for n, tensor in chosen.items()}
        specs = {n: tensor.spec for n, tensor in cast.items()}
        writer = pretrained_writer(folder, entry, specs, source=str(checkpoint), max_shard_size=max_shard_size)
        write_weights(writer, cast)
        write_manifest(folder, _holds(opened, weights, average), {'checkpoint': str(checkpoint)})
    return Path(out)


def _holds(checkpoint: Checkpoint, weights: str, average: Optional[str]) -> str:
    if weights == TRAINING:
        return TRAINING
    if weights == MODEL:
        return checkpoint.model_holds
    name = checkpoint.average_name(average)
    return name if weights == AVERAGE else f'{name} {weights}'
