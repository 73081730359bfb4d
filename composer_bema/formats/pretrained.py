# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Hugging Face folders, read: the weights of a model or an adapter one by one when asked for, and what belongs to them.

Reading executes nothing of what a folder holds, and opening reads no values.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
from safetensors import SafetensorError, safe_open

from composer_bema.formats.harmless import is_file_name
from composer_bema.formats.manifest import MANIFEST
from composer_bema.formats.safetensors_files import DTYPES, bytes_of
from composer_bema.formats.tensors import LazyTensor, piece_memory
from composer_bema.formats.unpickling import load_archive

__all__ = [
    'ADAPTER_CONFIG',
    'CONFIG',
    'Pretrained',
    'copy_companions',
    'download',
    'find_pretrained',
    'is_pretrained',
    'open_pretrained',
    'read_config',
    'read_safetensors',
]

CONFIG = 'config.json'
ADAPTER_CONFIG = 'adapter_config.json'

_INDEX = '.index.json'
# What transformers and PEFT call weights, in the order in which they look for them.
_WEIGHTS = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'adapter_model.safetensors',
    'adapter_model.bin',
)

# Files that belong to a model by their suffixes, beside its weights, and in any folder of it.
_COMPANIONS = ('.json', '.txt', '.model', '.tiktoken', '.bpe', '.codes', '.spm', '.vocab', '.jinja', '.py')
_COMPANIONS_IN_FOLDERS = ('.jinja', '.py')
# Those with such suffixes that belong to the run that has trained it, and the folders of others.
_OF_THE_RUN = (MANIFEST, 'trainer_state.json', '*_results.json', f'*{_INDEX}', 'zero_to_fp32.py')
_FOLDERS_OF_THE_RUN = ('.*', 'checkpoint-*', 'global_step*', 'runs', 'wandb')


@dataclass(frozen=True)
class Pretrained:
    """The weights in a Hugging Face folder.

    Args:
        folder (Path): The folder.
        weights (dict[str, LazyTensor]): The weights, in the order of the files.
        files (tuple[Path, ...]): The files that they are in, and their index.
        stem (str): What the files are called: ``'model'``, ``'pytorch_model'`` or ``'adapter_model'``.
    """

    folder: Path
    weights: dict[str, LazyTensor]
    files: tuple[Path, ...]
    stem: str


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder holds weights under one of the names that transformers and PEFT give them."""
    return _weights_file(folder) is not None


def open_pretrained(folder: Path) -> Pretrained:
    """Opens a Hugging Face folder, of which weights are read when they are asked for; safetensors rather than others.

    Args:
        folder (Path): A folder with ``model.safetensors``, ``pytorch_model.bin``, an index of several such files, or an
            ``adapter_model`` of PEFT.

    Raises:
        FileNotFoundError: If there is no such folder, or no weights in it.
        ValueError: If a file is damaged, cut or missing, or contradicts the index. Reading from one that has changed
            meanwhile raises one too.
    """
    file = _weights_file(folder)
    if file is None:
        where = f"'{folder}' holds no weights" if folder.is_dir() else f"There is no folder '{folder}'"
        raise FileNotFoundError(f'{where}: a Hugging Face folder with one of {", ".join(_WEIGHTS)} was expected.')
    if file.name.endswith(_INDEX):
        weights, files = _read_shards(file)
    else:
        weights, files = _read_file(file), (file,)
    if not weights:
        _refuse(file, 'it holds no tensors')
    return Pretrained(folder, weights, files, file.name.partition('.')[0])


def read_safetensors(file: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a file of safetensors by their names, in its order.

    One that is read whole is a view of the file, mapped into memory. Read piece by piece, no more than that piece of it
    is in memory. The file is not open in between.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or cut.
    """
    # The library checks that the header is sound and fits the file, but does not say where in it tensors are.
    with _opened(file):
        header, start = _header(file)
    tensors = {}
    for name, entry in header.items():
        if entry['dtype'] not in DTYPES:
            _refuse(file, f"the dtype {entry['dtype']} of its tensor '{name}' is unknown")
        shape, dtype = torch.Size(entry['shape']), DTYPES[entry['dtype']]
        stream = functools.partial(_stream, file, start + entry['data_offsets'][0], shape.numel(), dtype)
        tensors[name] = LazyTensor(shape, dtype, functools.partial(_read_tensor, file, name), stream)
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """Returns the configuration of a model or an adapter.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(config, dict):
            raise TypeError(f'it holds a {type(config).__name__}')
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): restore the configuration of the model.") from error
    return config


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs to a model, its weights apart, from one folder to another, where files are replaced.

    These are the files that end in ``.json``, ``.txt``, ``.model``, ``.tiktoken``, ``.bpe``, ``.codes``, ``.spm``,
    ``.vocab``, ``.jinja`` or ``.py``: the configurations of model, adapter, generation and preprocessing, tokenizers,
    chat templates and code. Of folders in the folder it is templates and code only. Left out are the indexes of weights
    and what a run leaves beside them (``trainer_state.json``, ``*_results.json``, ``zero_to_fp32.py``, our own
    ``averaging.json``; hidden folders, ``checkpoint-*``, ``global_step*``, ``runs`` and ``wandb``). All else has other
    suffixes. Of links to files, which the cache of the hub is made of, the files are copied.

    Args:
        source (Path): A Hugging Face folder.
        target (Path): Another folder.
    """
    for path in _companions(source, _COMPANIONS):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # The content alone, for files in the cache may not be written to.
        shutil.copyfile(path, copy)


def find_pretrained(name_or_folder: str) -> Path:
    """Returns a local folder as it is, or that to which a model was downloaded from the Hugging Face hub.

    Of a model's weights safetensors are downloaded, and others only if there are none.

    Raises:
        FileNotFoundError: If it is no folder, and no model that can be downloaded.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    patterns = [f'*{suffix}' for suffix in _COMPANIONS]
    folder = download(name_or_folder, [*patterns, 'model.safetensors', 'adapter_model.safetensors'])
    if not is_pretrained(folder):
        folder = download(name_or_folder, ['pytorch_model.bin', 'adapter_model.bin'])
    file = _weights_file(folder)
    if file is not None and file.name.endswith(_INDEX):
        folder = download(name_or_folder, sorted(set(_read_index(file).values())))
    return folder


def _weights_file(folder: Path) -> Optional[Path]:
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def _read_file(file: Path) -> dict[str, LazyTensor]:
    return read_safetensors(file) if file.suffix == '.safetensors' else _read_archive(file)


def _read_archive(file: Path) -> dict[str, LazyTensor]:
    try:
        content = load_archive(file)
    except ValueError as error:
        _refuse(file, str(error), error)
    if not isinstance(content, Mapping):
        content = {}
    return {
        name: LazyTensor.of(tensor.detach())
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def _read_shards(index: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    """Returns the weights of several files, and these files with their index."""
    file_names = _read_index(index)
    weights, files = {}, [index]
    for file_name in sorted(set(file_names.values())):
        file = index.parent / file_name
        if not file.is_file():
            raise ValueError(f"'{file}' is missing, which '{index}' names; use another checkpoint.")
        tensors = _read_file(file)
        lacking = next((n for n, name in file_names.items() if name == file_name and n not in tensors), None)
        if lacking is not None:
            raise ValueError(
                f"'{file}' lacks the tensor '{lacking}', which '{index}' says is there; use another checkpoint."
            )
        # transformers takes tensors that the index leaves out, too.
        weights.update({n: tensor for n, tensor in tensors.items() if file_names.get(n, file_name) == file_name})
        files.append(file)
    return weights, tuple(files)


def _read_index(index: Path) -> dict[str, str]:
    """Returns the names of the files by those of the tensors in them."""
    try:
        file_names = json.loads(index.read_text(encoding='utf-8'))['weight_map']
        if not isinstance(file_names, dict) or not all(isinstance(name, str) for name in file_names.values()):
            raise TypeError('its weight_map is none')
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{index}' is damaged: it does not say which file each tensor is in.") from error
    for name in file_names.values():
        if not is_file_name(name):
            raise ValueError(f"'{index}' names the file '{name}', which is not in its folder.")
    return file_names


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework='pt') as opened:
            yield opened
    except SafetensorError as error:
        _refuse(file, str(error).removeprefix('Error while deserializing header: '), error)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns what a sound file of safetensors says of its tensors, and where their bytes begin."""
    with file.open('rb') as opened:
        length = int.from_bytes(opened.read(8), 'little')
        header = json.loads(opened.read(length))
    header.pop('__metadata__', None)
    return header, 8 + length


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as opened:
        return opened.get_tensor(name)


def _stream(
    file: Path, start: int, numel: int, dtype: torch.dtype, size: int, memory: Optional[torch.Tensor]
) -> Iterator[torch.Tensor]:
    values = piece_memory(min(size, numel), dtype, memory)
    for begin in range(0, max(numel, 1), size):
        piece = values[: numel - begin]
        with file.open('rb', buffering=0) as opened:
            opened.seek(start + begin * dtype.itemsize)
            if opened.readinto(bytes_of(piece)) < piece.nbytes:
                _refuse(file, 'its end is missing')
        yield piece


def _companions(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            # Links to folders may lead in circles.
            if not path.is_symlink() and not any(path.match(pattern) for pattern in _FOLDERS_OF_THE_RUN):
                yield from _companions(path, _COMPANIONS_IN_FOLDERS)
        elif path.suffix in suffixes and not any(path.match(pattern) for pattern in _OF_THE_RUN):
            yield path


def download(name: str, patterns: list[str]) -> Path:
    """Returns the folder to which the files of a model on the Hugging Face hub were downloaded.

    Args:
        name (str): The model's name on the hub.
        patterns (list[str]): What the files are called; others are left out.

    Raises:
        FileNotFoundError: If there is no such model, or no way to it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        # The hub's own errors are of these, with several lines of advice on Python code.
        reason = ' '.join(str(error).split()).split('. ')[0].rstrip('.:')
        raise FileNotFoundError(
            f"'{name}' is neither a folder nor a model that could be downloaded from the Hugging Face hub: {reason}."
        ) from error


def _refuse(file: Path, problem: str, cause: Optional[Exception] = None) -> NoReturn:
    raise ValueError(f"'{file}' cannot be read as weights: {problem}; use another checkpoint.") from cause
