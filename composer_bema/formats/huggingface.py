# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Hugging Face folders: configuration, tokenizer and safetensors, in place only when they are complete.

Composer keeps a model's configuration and its tokenizer's files as an entry of its checkpoints, from which
:func:`write_pretrained` works. transformers is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from composer_bema.averaging.parameters import first_names
from composer_bema.formats.tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    'model_without_memory',
    'new_folder',
    'write_adapter',
    'write_model',
    'write_pretrained',
    'write_tokenizer',
]

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = '5GB'

# What Composer's HuggingFaceModel puts in front of the names of the model in it.
_PREFIX = 'model.'
# What FSDP2 puts in front of the name of a class whose parameters it shards.
_SHARDED_CLASS = 'FSDP'
_WEIGHTS = 'model.safetensors'


@contextlib.contextmanager
def new_folder(folder: Union[str, Path], *, replace: bool = False) -> Iterator[Path]:
    """Holds a temporary folder to write to, which becomes ``folder`` when all has been written, and else is removed.

    Args:
        folder (str | Path): The folder to make.
        replace (bool): Whether a folder that is there already is replaced. Default: ``False``.

    Raises:
        FileExistsError: If it is there and not empty, and is not to be replaced.
    """
    folder = Path(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' exists and is not an empty folder: name another one, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as temporary:
        unfinished, replaced = Path(temporary) / 'new', Path(temporary) / 'old'
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.rglob('*'):
            if path.is_file():
                # safetensors leaves its files to their owner alone.
                path.chmod(unfinished.stat().st_mode & 0o666)
        if replace and folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)


def write_pretrained(
    folder: Path,
    entry: Mapping[str, Any],
    weights: Mapping[str, LazyTensor],
    *,
    source: str,
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
) -> None:
    """Writes what Composer keeps of a Hugging Face model, with the weights given: an adapter's alone, if it has one.

    Args:
        folder (Path): An empty folder.
        entry (Mapping[str, Any]): The entry ``integrations/huggingface`` of a checkpoint.
        weights (Mapping[str, LazyTensor]): The weights by the names of the checkpoint's model.
        source (str): The checkpoint, for messages.
        max_shard_size (int | str): The size at which another file of weights begins, which is also about how much of
            them is in memory. Default: ``'5GB'``.

    Raises:
        ValueError: If the entry is of another kind, or an adapter's base model is not one of transformers'.
    """
    try:
        model_entry, tokenizer_entry = entry['model'], entry.get('tokenizer') or {}
        config, class_name = dict(model_entry['config']['content']), str(model_entry['config']['class'])
        peft_config = model_entry['peft_config']['content'] if 'peft_config' in model_entry else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"What '{source}' says of its Hugging Face model is incomplete: {error}.") from error
    named = {n.removeprefix(_PREFIX): tensor for n, tensor in weights.items() if n.startswith(_PREFIX)}
    if len(named) < len(weights):
        log.warning('%d tensors are not of the Hugging Face model and were left out.', len(weights) - len(named))
    if peft_config is None:
        write_model(folder, config, named, _matching_model(config, class_name, named), max_shard_size)
    else:
        try:
            model = _adapted_model(config, peft_config)
        except ValueError as error:
            raise ValueError(f"The adapter in '{source}' cannot be told from its base model: {error}.") from error
        # Left to decide on embeddings by itself, it would look for the base model on the hub.
        write_adapter(folder, model, named, save_embedding_layers=False)
    try:
        write_tokenizer(folder, tokenizer_entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The tokenizer in '{source}' cannot be written: {error}.") from error


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, LazyTensor],
    model: Optional[PreTrainedModel],
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
) -> None:
    """Writes configuration, generation settings and weights as ``from_pretrained`` reads them.

    Args:
        folder (Path): An empty folder.
        config (Mapping[str, Any]): The configuration.
        weights (Mapping[str, LazyTensor]): The weights by the model's names.
        model (PreTrainedModel, optional): A model of this configuration, which knows what is tied; its tensors are not
            looked at. Without it every name gets its tensor, and there are no generation settings.
        max_shard_size (int | str): See :func:`write_pretrained`.
    """
    names = {}
    if model is not None:
        names = first_names(model)
        # The weights would all have to be in memory at once, so that it gets none.
        model.save_pretrained(folder, state_dict={'none': torch.empty(0)})
        (folder / _WEIGHTS).unlink()
        config = {**json.loads((folder / 'config.json').read_text()), 'architectures': [_class_name(model)]}
    kept: dict[str, LazyTensor] = {}
    for n, tensor in weights.items():
        kept.setdefault(names.get(n, n), tensor)
    dtype = next((t.dtype for t in kept.values() if t.dtype.is_floating_point), torch.float32)
    _write_json(folder / 'config.json', {**config, 'torch_dtype': str(dtype).removeprefix('torch.')})
    _write_safetensors(folder, kept, max_shard_size)


def write_adapter(folder: Path, model: Any, weights: Mapping[str, LazyTensor], **kwargs: Any) -> None:
    """Writes the adapter of a PEFT model: its configuration, and those of the weights that are its own."""
    from peft import PeftType

    for config in model.peft_config.values():
        # Composer leaves a plain string there, with which PEFT cannot write its model card.
        config.peft_type = PeftType(config.peft_type)
    state = {n: tensor.read() for n, tensor in weights.items()}
    model.save_pretrained(str(folder), state_dict=state, **kwargs)


def write_tokenizer(folder: Path, entry: Mapping[str, Any]) -> None:
    """Writes the files of a tokenizer from what Composer keeps of them."""
    for name, saved in entry.items():
        extension, content = saved['file_extension'], saved.get('content')
        name = name if name.endswith(extension) else name + extension
        if Path(name).name != name:
            raise ValueError(f"'{name}' is no plain name of a file")
        if extension == '.json':
            # A sharded checkpoint has nothing where an empty dict was.
            _write_json(folder / name, {} if content is None else content)
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text('\n'.join(content) if isinstance(content, list) else content, encoding='utf-8')


def model_without_memory(model_class: type, config: PretrainedConfig) -> Optional[PreTrainedModel]:
    """Returns a model whose tensors have shapes and no memory, or None where the class needs values to be made."""
    try:
        with torch.device('meta'):
            return model_class(config)
    except Exception as error:
        # A model's constructor may compute with its tensors, or want more than a configuration.
        log.debug('%s cannot be made without memory: %s', model_class.__name__, error)
        return None


def _matching_model(
    config: Mapping[str, Any], class_name: str, weights: Mapping[str, LazyTensor]
) -> Optional[PreTrainedModel]:
    """Returns a model of transformers that has exactly these weights, or None if there is none."""
    import transformers

    parsed = _parse_config(config)
    if parsed is None:
        return None
    # FSDP1 hides the name of the class behind its own, so that others have to be tried.
    names = [class_name.rpartition('.')[2].removeprefix(_SHARDED_CLASS), *(config.get('architectures') or ())]
    classes = [getattr(transformers, name, None) for name in names]
    classes.append(transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(parsed), None))
    for model_class in classes:
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            model = model_without_memory(model_class, parsed)
            if model is not None and _first(model, model.state_dict()) == _first(model, weights):
                return model
    return None


def _first(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    first = first_names(model)
    return {first.get(n, n) for n in names}


def _adapted_model(config: Mapping[str, Any], peft_config: Mapping[str, Any]) -> Any:
    """Returns a PEFT model whose tensors have no memory."""
    import transformers

    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "The checkpoint is of a PEFT model, and peft is not installed: pip install 'composer_bema[peft]'."
        ) from error
    parsed = _parse_config(config)
    auto_classes = {
        'CAUSAL_LM': transformers.AutoModelForCausalLM,
        'SEQ_2_SEQ_LM': transformers.AutoModelForSeq2SeqLM,
        'SEQ_CLS': transformers.AutoModelForSequenceClassification,
        'TOKEN_CLS': transformers.AutoModelForTokenClassification,
        'QUESTION_ANS': transformers.AutoModelForQuestionAnswering,
    }
    auto_class = auto_classes.get(str(peft_config.get('task_type')), transformers.AutoModel)
    try:
        with torch.device('meta'):
            return peft.get_peft_model(
                auto_class.from_config(parsed),
                peft.PeftConfig.from_peft_type(**{**peft_config, 'inference_mode': False}),
            )
    except Exception as error:
        # What a base model or an adapter cannot be made of is up to their constructors.
        raise ValueError(' '.join(str(error).split()).rstrip('.')) from error


def _parse_config(config: Mapping[str, Any]) -> Optional[PretrainedConfig]:
    import transformers

    try:
        return transformers.AutoConfig.for_model(**config)
    except (KeyError, TypeError, ValueError) as error:
        log.info('transformers has no model for the configuration in the checkpoint: %s', error)
        return None


def _class_name(model: PreTrainedModel) -> str:
    return type(model).__name__.removeprefix(_SHARDED_CLASS)


def _write_safetensors(folder: Path, weights: Mapping[str, LazyTensor], max_shard_size: Union[int, str]) -> None:
    """Writes tensors file by file, and an index if there are several files."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    sizes = {n: torch.empty(tensor.shape, dtype=tensor.dtype, device='meta') for n, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for name, tensors in split.filename_to_tensors.items():
        save_file(_unshared({n: weights[n].read() for n in tensors}), folder / name, metadata={'format': 'pt'})
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        _write_json(folder / f'{_WEIGHTS}.index.json', index)


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns tensors of which no two share memory, as safetensors wants them."""
    unshared, seen = {}, set()
    for n, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        unshared[n] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return unshared


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')
