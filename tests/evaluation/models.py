# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A language model small enough to answer hundreds of questions in seconds, and questions on disk."""

import functools
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).parent / 'data'
FILES = {task: DATA / f'{task}.jsonl' for task in ('boolq', 'gsm8k', 'mmlu_hs')}

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
    '{% if add_generation_prompt %}<assistant>{% endif %}'
)


@functools.cache
def make_model(context: int = 2048, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Weights far from zero, so that its likelihoods differ."""
    torch.manual_seed(3)
    sizes = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    config = LlamaConfig(vocab_size=259, max_position_embeddings=context, **sizes, pad_token_id=0, eos_token_id=1)
    model = LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model.eval()


def make_tokenizer(chat: bool = False) -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0, chat_template=CHAT_TEMPLATE if chat else None)
