# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Models as the lm-evaluation-harness wants them: in this process, or read by vLLM from a temporary folder."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ['Backend', 'language_model', 'max_length_of', 'require_harness', 'without_end']

Backend = Literal['hf', 'vllm']


class LanguageModel(Protocol):
    """What the harness calls a language model, as far as it is used here."""

    @property
    def max_length(self) -> int:
        """The tokens of its context."""
        ...

    def tok_encode(self, string: str) -> list[int]:
        """Returns a prompt as the model gets it."""
        ...


def require_harness(backend: Backend = 'hf') -> None:
    """Checks that the lm-evaluation-harness is installed, and what generates.

    Raises:
        ImportError: If it is not.
        ValueError: If there is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be one of {", ".join(get_args(Backend))}, not {backend!r}.')
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Questions are asked through the lm-evaluation-harness: pip install 'composer_bema[eval]'."
        ) from error
    if backend == 'vllm' and importlib.util.find_spec('vllm') is None:
        raise ImportError('vLLM is not installed: pip install vllm, or take --backend hf.')


def max_length_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the tokens of a model's context, prompt and answer together, as the harness finds them."""
    from lm_eval.models.utils import resolve_max_length

    return resolve_max_length(model.config, tokenizer)


@contextlib.contextmanager
def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backend: Backend, batch_size: int, seed: int
) -> Iterator[LanguageModel]:
    """Holds a model as the harness wants it.

    Args:
        model (PreTrainedModel): The model, which is put into evaluation mode.
        tokenizer (PreTrainedTokenizerBase): What prompts are encoded with.
        backend (str): ``'hf'`` generates in this process. ``'vllm'`` is given a folder, which it may keep on disk while
            it lasts; the model itself waits in host memory, so that the GPU is vLLM's.
        batch_size (int): Sequences that the former generates at a time.
        seed (int): Of the latter's random numbers.
    """
    from lm_eval.api.registry import get_model

    model.eval()
    model_class: Any = get_model(backend)
    if backend == 'hf':
        with _without_settings_of_its_own(model):
            yield model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        return
    with tempfile.TemporaryDirectory(prefix='composer-bema-vllm-') as folder, _waiting_on_the_cpu(model):
        _save(model, tokenizer, Path(folder))
        lm = model_class(
            pretrained=folder,
            dtype=str(model.dtype).removeprefix('torch.'),
            max_model_len=max_length_of(model, tokenizer),
            seed=seed,
            batch_size='auto',
        )
        # What it has read from the folder may begin and end prompts otherwise.
        lm.tokenizer = tokenizer
        try:
            yield lm
        finally:
            _shut_down(lm)


def without_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that begins texts as this one does, and ends them with no token of its own.

    Else every prompt would end with the end of text that some add (ByT5's, and those of Llama with ``add_eos_token``),
    behind which a model does not answer.
    """
    encoded: Any = tokenizer('a')
    plain: Any = tokenizer('a', add_special_tokens=False)
    ids, text = list(encoded['input_ids']), list(plain['input_ids'])
    start = next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), len(ids))
    if not ids[start + len(text) :]:
        return tokenizer
    copied: Any = copy.deepcopy(tokenizer)
    beginning = ids[:start]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        special = {'id': 'beginning', 'ids': beginning, 'tokens': tokenizer.convert_ids_to_tokens(beginning)}
        template = {'single': 'beginning $A', 'special_tokens': [special]} if beginning else {'single': '$A'}
        copied.backend_tokenizer.post_processor = TemplateProcessing(**template)
    else:
        copied.build_inputs_with_special_tokens = lambda token_ids, _=None: [*beginning, *token_ids]
    return copied


@contextlib.contextmanager
def _without_settings_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Takes away how a model would generate by itself (min_p, max_new_tokens, ...), for the protocol says that."""
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    model.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _waiting_on_the_cpu(model: PreTrainedModel) -> Iterator[None]:
    device: Any = model.device
    model.to('cpu')  # pyright: ignore[reportArgumentType]
    gc.collect()
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model as a folder of its own, an adapter as one with its base."""
    whole = _merged(model) if hasattr(model, 'peft_config') else model
    with _without_settings_of_its_own(whole):
        whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _merged(model: Any) -> PreTrainedModel:
    """Returns a copy of a PEFT model with the adapter in its base's weights; the model itself stays as it is."""
    if not hasattr(model, 'merge_and_unload'):
        kind = next(iter(model.peft_config.values())).peft_type
        raise ValueError(f'An adapter of the kind {kind} cannot be merged into its base for vLLM: take --backend hf.')
    merged = copy.deepcopy(model).merge_and_unload()
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        # They were tied in the base, and one of them was trained.
        merged.config.tie_word_embeddings = False
    return merged


def _shut_down(lm: Any) -> None:
    """Ends vLLM's engine and gives back its memory, so that another model has room."""
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

    del lm.model
    gc.collect()
    cleanup_dist_env_and_memory()
