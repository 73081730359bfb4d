# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Hugging Face folders: configuration, tokenizer and safetensors, in place only when they are complete.

Composer keeps a model's configuration and its tokenizer's files as an entry of its checkpoints, from which
:func:`pretrained_writer` works. transformers is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Protocol, Union

import torch

from composer_bema.averaging.parameters import first_names
from composer_bema.formats.foreign_code import ForeignCodeError, no_foreign_code
from composer_bema.formats.harmless import is_file_name, names_model, refuse_named_code, refuse_named_model
from composer_bema.formats.manifest import MANIFEST
from composer_bema.formats.pretrained import ADAPTER_CONFIG, CONFIG, read_safetensors
from composer_bema.formats.safetensors_files import MAX_SHARD_SIZE, SafetensorsFiles, write_json
from composer_bema.formats.tensors import LazyTensor, TensorSpec, main_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    'PREFIX',
    'ModelWriter',
    'WeightsWriter',
    'model_without_memory',
    'new_folder',
    'pretrained_writer',
    'write_adapter',
    'write_tokenizer',
    'write_weights',
]

log = logging.getLogger(__name__)

# What Composer's HuggingFaceModel puts in front of the names of the model in it.
PREFIX = 'model.'
# What FSDP2 puts in front of the name of a class whose parameters it shards.
_SHARDED_CLASS = 'FSDP'
_WEIGHTS = 'model.safetensors'
# What the files of a tokenizer may not be called, for they lie beside those of the model.
_OF_THE_MODEL = (CONFIG, ADAPTER_CONFIG, 'generation_config.json', MANIFEST)
_OF_WEIGHTS = ('.safetensors', '.bin', '.index.json')

# In a temporary folder: what is being written, and what it is about to replace.
_NEW = 'new'
_REPLACED = 'old'

# Elements that are written at a time.
_PIECE = 1024 * 1024


@contextlib.contextmanager
def new_folder(folder: Union[str, Path], *, replace: bool = False) -> Iterator[Path]:
    """Holds a temporary folder to write to, which becomes ``folder`` when all has been written, and else is removed.

    The folders that it is in are made, and removed with it. What a killed process has left of an earlier attempt is
    removed, too.

    Args:
        folder (str | Path): The folder to make.
        replace (bool): Whether a folder that is there already is replaced. Default: ``False``.

    Raises:
        FileExistsError: If it is there and not empty, and is not to be replaced; or is mounted or in use.
    """
    # Where a link leads to.
    folder = Path(folder).resolve()
    prefix = f'.{folder.name}-unfinished-'
    for abandoned in folder.parent.glob(f'{glob.escape(prefix)}*'):
        with _locked(abandoned) as is_ours:
            if is_ours:
                _clear_up(abandoned, folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' exists and is not an empty folder: name another one, or remove it.")
    if folder.is_mount() or folder == Path.cwd():
        raise FileExistsError(f"'{folder}' cannot be made anew, since it is mounted or in use: name a folder in it.")
    with (
        _parents_of(folder),
        tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary,
        _locked(Path(temporary)),
    ):
        unfinished, replaced = Path(temporary) / _NEW, Path(temporary) / _REPLACED
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.rglob('*'):
            if path.is_file():
                # safetensors leaves its files to their owner alone.
                path.chmod(unfinished.stat().st_mode & 0o666)
        if replace and folder.exists():
            folder.rename(replaced)
        try:
            unfinished.rename(folder)
        finally:
            _put_back(replaced, folder)


@contextlib.contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """Makes the folders that a folder is in, and if the block fails removes them, but for what others put in them."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds a folder against other processes for as long as this one lives, and says whether none holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Another process has it, or this file system knows no locks.
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _clear_up(abandoned: Path, folder: Path) -> None:
    """Removes what a killed process has left; the folder that it was about to replace goes back to its place."""
    _put_back(abandoned / _REPLACED, folder)
    shutil.rmtree(abandoned)


def _put_back(replaced: Path, folder: Path) -> None:
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


class WeightsWriter(Protocol):
    """Writes weights that come piece by piece, under the names that they have in a checkpoint.

    Of several processes one calls ``create`` before, and ``finish`` after all have written their share.
    """

    def create(self) -> None:
        """Makes all that is there beside the weights, and room for these."""
        ...

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Writes the values of a tensor from the element ``start`` on; what is not to be written is passed over."""
        ...

    def finish(self) -> None:
        """Completes what has been written."""
        ...

    def close(self) -> None:
        """Lets go of the files, complete or not."""
        ...


def write_weights(writer: WeightsWriter, weights: Mapping[str, LazyTensor]) -> None:
    """Writes weights, of which there is no more in memory than a piece."""
    try:
        writer.create()
        for name, tensor in weights.items():
            start = 0
            for values in tensor.pieces(_PIECE):
                writer.write(name, start, values)
                start += values.numel()
        writer.finish()
    finally:
        writer.close()


def pretrained_writer(
    folder: Path,
    entry: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    *,
    source: str,
    max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
) -> WeightsWriter:
    """Returns what writes a Hugging Face model of which a checkpoint has an entry: an adapter's weights alone, if any.

    Args:
        folder (Path): An empty folder.
        entry (Mapping[str, Any]): The entry ``integrations/huggingface`` of a checkpoint.
        specs (Mapping[str, TensorSpec]): The weights by the names of the checkpoint's model.
        source (str): The checkpoint, for messages.
        max_shard_size (int | str): The size at which another file of weights begins. Default: ``'5GB'``.

    Raises:
        ValueError: If the entry is of another kind, names code, or has an adapter of a base model that is not one of
            transformers', or that has another one loaded.
    """
    try:
        model_entry, tokenizer_entry = entry['model'], entry.get('tokenizer') or {}
        config, class_name = dict(model_entry['config']['content']), str(model_entry['config']['class'])
        peft_config = model_entry['peft_config']['content'] if 'peft_config' in model_entry else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"What '{source}' says of its Hugging Face model is incomplete: {error}.") from error
    for each in (config, peft_config):
        refuse_named_code(each or {}, source)
    named = {n.removeprefix(PREFIX): spec for n, spec in specs.items() if n.startswith(PREFIX)}
    if len(named) < len(specs):
        log.warning('%d tensors are not of the Hugging Face model and were left out.', len(specs) - len(named))
    if peft_config is None:
        with no_foreign_code(source):
            model = _matching_model(config, class_name, named)
        writer: WeightsWriter = ModelWriter(folder, config, named, model, max_shard_size)
    else:
        refuse_named_model(config, source)
        try:
            with no_foreign_code(source):
                adapted = _adapted_model(config, peft_config)
        except ForeignCodeError:
            raise
        except ValueError as error:
            raise ValueError(f"The adapter in '{source}' cannot be told from its base model: {error}.") from error
        writer = _AdapterWriter(folder, adapted, named)
    return _PretrainedWriter(writer, folder, tokenizer_entry, source)


class ModelWriter:
    """Writes configuration, generation settings and weights as ``from_pretrained`` reads them.

    Args:
        folder (Path): An empty folder.
        config (Mapping[str, Any]): The configuration.
        specs (Mapping[str, TensorSpec]): The weights by the model's names.
        model (PreTrainedModel, optional): A model of this configuration, which knows what is tied; its tensors are not
            looked at. Without it every name gets its tensor, and there are no generation settings.
        max_shard_size (int | str): See :func:`pretrained_writer`.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        specs: Mapping[str, TensorSpec],
        model: Optional[PreTrainedModel],
        max_shard_size: Union[int, str] = MAX_SHARD_SIZE,
    ) -> None:
        self._folder = folder
        self._config = config
        self._model = model
        first = {} if model is None else first_names(model)
        self._names: dict[str, str] = {}
        kept: dict[str, TensorSpec] = {}
        for n, spec in specs.items():
            name = first.get(n, n)
            if name not in kept:
                kept[name], self._names[n] = spec, name
        self._dtype = main_dtype(kept.values()) or torch.float32
        self._files = SafetensorsFiles(folder, kept, max_shard_size=max_shard_size)

    def create(self) -> None:
        config = self._config
        if self._model is not None:
            # The weights would all have to be in memory at once, so that it gets none.
            self._model.save_pretrained(self._folder, state_dict={'none': torch.empty(0)})
            (self._folder / _WEIGHTS).unlink()
            written = json.loads((self._folder / CONFIG).read_text())
            config = {**written, 'architectures': [_class_name(self._model)]}
        write_json(self._folder / CONFIG, {**config, 'torch_dtype': str(self._dtype).removeprefix('torch.')})
        self._files.create()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        if name in self._names:
            self._files.write(self._names[name], start, values)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._files.close()


class _AdapterWriter:
    """Collects the weights of an adapter in a file, for PEFT to write them."""

    def __init__(self, folder: Path, model: Any, specs: Mapping[str, TensorSpec]) -> None:
        self._folder = folder
        self._model = model
        trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
        self._specs = {n: spec for n, spec in specs.items() if n in trained}
        self._scratch = folder / 'weights.safetensors'
        self._files = SafetensorsFiles(folder, self._specs, self._scratch.stem, max_shard_size=None)

    def create(self) -> None:
        self._files.create()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        if name in self._specs:
            self._files.write(name, start, values)

    def finish(self) -> None:
        weights = {n: tensor.read() for n, tensor in read_safetensors(self._scratch).items()}
        # Left to decide on embeddings by itself, PEFT would look for the base model on the hub.
        write_adapter(self._folder, self._model, weights, save_embedding_layers=False)
        self._scratch.unlink()

    def close(self) -> None:
        self._files.close()


class _PretrainedWriter:
    """Writes the weights and the tokenizer of a checkpoint of Composer's HuggingFaceModel."""

    def __init__(self, weights: WeightsWriter, folder: Path, tokenizer_entry: Mapping[str, Any], source: str) -> None:
        self._weights = weights
        self._folder = folder
        self._tokenizer_entry = tokenizer_entry
        self._source = source

    def create(self) -> None:
        self._weights.create()
        try:
            write_tokenizer(self._folder, self._tokenizer_entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The tokenizer in '{self._source}' cannot be written: {error}; use another checkpoint."
            ) from error

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        if name.startswith(PREFIX):
            self._weights.write(name.removeprefix(PREFIX), start, values)

    def finish(self) -> None:
        self._weights.finish()

    def close(self) -> None:
        self._weights.close()


def write_adapter(folder: Path, model: Any, weights: Mapping[str, torch.Tensor], **kwargs: Any) -> None:
    """Writes the adapter of a PEFT model: its configuration, and those of the weights that are its own."""
    from peft import PeftType

    for config in model.peft_config.values():
        # Composer leaves a plain string there, with which PEFT cannot write its model card.
        config.peft_type = PeftType(config.peft_type)
    model.save_pretrained(str(folder), state_dict=dict(weights), **kwargs)


def write_tokenizer(folder: Path, entry: Mapping[str, Any]) -> None:
    """Writes the files of a tokenizer from what Composer keeps of them."""
    for name, saved in entry.items():
        extension, content = saved['file_extension'], saved.get('content')
        name = name if name.endswith(extension) else name + extension
        if not is_file_name(name):
            raise ValueError(f"'{name}' is no plain name of a file")
        if name in _OF_THE_MODEL or name.endswith(_OF_WEIGHTS):
            raise ValueError(f"'{name}' is a file of the model, and none of a tokenizer")
        if (folder / name).exists():
            raise ValueError(f"'{name}' is there already")
        if extension == '.json':
            # A sharded checkpoint has nothing where an empty dict was.
            write_json(folder / name, {} if content is None else content)
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text('\n'.join(content) if isinstance(content, list) else content, encoding='utf-8')


def model_without_memory(model_class: type, config: PretrainedConfig) -> Optional[PreTrainedModel]:
    """Returns a model whose tensors have shapes and no memory, or None where the class needs values to be made."""
    try:
        with torch.device('meta'):
            return model_class(config)
    except ForeignCodeError:
        raise
    except Exception as error:
        # A model's constructor may compute with its tensors, or want more than a configuration.
        log.debug('%s cannot be made without memory: %s', model_class.__name__, error)
        return None


def _matching_model(
    config: Mapping[str, Any], class_name: str, weights: Mapping[str, Any]
) -> Optional[PreTrainedModel]:
    """Returns a model of transformers that has exactly these weights, or None if there is none."""
    import transformers

    # Such a model would have another one loaded, which need not be there, nor be what it was.
    parsed = None if names_model(config) else _parse_config(config)
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
                auto_class.from_config(parsed, trust_remote_code=False),
                peft.PeftConfig.from_peft_type(**{**peft_config, 'inference_mode': False}),
            )
    except ForeignCodeError:
        raise
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
