# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A stand-in for vLLM, small enough for a CPU, under the harness's own class for it.

Classes and functions have the signatures of vLLM's own, as far as the harness and this project use them: what vLLM
would not take is an error here, too.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import sys
import types
import weakref
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSION = '0.11.0'


class SamplingParams:
    def __init__(
        self,
        *,
        max_tokens,
        temperature,
        stop=(),
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        prompt_logprobs=None,
        detokenize=True,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
    ):
        assert detokenize or not stop
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.prompt_logprobs = prompt_logprobs


class LLM:
    """Generates with transformers what vLLM would generate."""

    alive = weakref.WeakSet()

    def __init__(
        self,
        model,
        *,
        tokenizer=None,
        tokenizer_mode='auto',
        trust_remote_code=False,
        tensor_parallel_size=1,
        dtype='auto',
        quantization=None,
        revision=None,
        tokenizer_revision=None,
        seed=None,
        max_model_len=None,
        max_num_seqs=None,
        enable_lora=False,
        max_lora_rank=16,
    ):
        assert not self.alive, 'the memory is that of another engine'
        self.alive.add(self)
        # vLLM reads models, not adapters.
        self.model = AutoModelForCausalLM.from_pretrained(model, torch_dtype=getattr(torch, dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.seed = seed
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=max_model_len))

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        torch.manual_seed(self.seed)
        return [
            self._answered(prompt['prompt_token_ids'], how)
            for prompt, how in zip(prompts, sampling_params, strict=True)
        ]

    def _answered(self, prompt, how):
        length = self.llm_engine.model_config.max_model_len
        assert len(prompt) + how.max_tokens <= length, 'vLLM refuses what is longer than max_model_len'
        ids = torch.tensor([prompt])
        logprobs = None
        if how.prompt_logprobs:
            every = self.model(ids).logits[0, :-1].log_softmax(-1)
            logprobs = [None] + [
                {row.argmax().item(): row.max().item(), token: row[token].item()}
                for row, token in zip(every, prompt[1:], strict=True)
            ]
        sampled = {'do_sample': True, 'top_k': 0} if how.temperature else {'do_sample': False}
        answer = self.model.generate(ids, max_new_tokens=how.max_tokens, **sampled)[0, len(prompt) :]
        text = self.tokenizer.decode(answer)
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)], prompt_logprobs=logprobs)


def get_tokenizer(tokenizer_name, *, tokenizer_mode, trust_remote_code, revision):
    return AutoTokenizer.from_pretrained(tokenizer_name)


def resolve_hf_chat_template(tokenizer, chat_template, tools, *, model_config):
    return tokenizer.chat_template


def cleanup_dist_env_and_memory(shutdown_ray=False):
    assert not LLM.alive, 'an engine is still there'


def _modules():
    contents = {
        'vllm': {'LLM': LLM, 'SamplingParams': SamplingParams, 'TokensPrompt': dict},
        'vllm.distributed': {'cleanup_dist_env_and_memory': cleanup_dist_env_and_memory},
        'vllm.entrypoints': {},
        'vllm.entrypoints.chat_utils': {'resolve_hf_chat_template': resolve_hf_chat_template},
        'vllm.lora': {},
        'vllm.lora.request': {'LoRARequest': object},
        'vllm.tokenizers': {'get_tokenizer': get_tokenizer},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = types.ModuleType(name)
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(modules[name]).update(content)
    return modules


def _version(name, real=importlib.metadata.version):
    return VERSION if name == 'vllm' else real(name)


@functools.cache
def _import_the_harness_class():
    """Imports the harness's own class, which looks for vLLM and its version when it is imported, once."""
    with mock.patch('importlib.metadata.version', _version):
        importlib.import_module('lm_eval.models.vllm_causallms')


@contextlib.contextmanager
def vllm_stand_in():
    """Lets vLLM be installed."""
    modules = _modules()
    sys.modules.update(modules)
    try:
        _import_the_harness_class()
        yield LLM
    finally:
        # Not by patching the dictionary, which would forget whatever else is imported meanwhile.
        for name in modules:
            del sys.modules[name]
