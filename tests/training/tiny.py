# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The smallest settings that train: a Llama of a few thousand parameters on a few blocks of text."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

TINY_MODEL = {
    'name': 'hf_causal_lm',
    'use_train_metrics': False,
    'config': {
        'model_type': 'llama',
        'hidden_size': 16,
        'num_hidden_layers': 1,
        'num_attention_heads': 2,
        'intermediate_size': 32,
        'max_position_embeddings': 64,
        'tie_word_embeddings': True,
    },
}


def tiny_settings(folder: Path) -> dict[str, Any]:
    """Settings of a run of six steps whose every file goes into ``folder``."""
    text = folder / 'text.txt'
    if not text.exists():
        text.write_text('The quick brown fox jumps over the lazy dog, and does so again. ' * 24)
    dataset = {'paths': str(text), 'train_fraction': 0.8}
    return {
        'run_folder': str(folder / 'run'),
        'seed': 3,
        'max_seq_len': 32,
        'max_duration': '6ba',
        'global_train_batch_size': 4,
        'progress_bar': False,
        'tokenizer': {'name': 'bytes'},
        'model': TINY_MODEL,
        'train_loader': {'name': 'text_files', 'dataset': {**dataset, 'shuffle': True}, 'drop_last': True},
        'eval_loader': [
            {'label': 'one', 'name': 'text_files', 'dataset': {**dataset, 'part': 'held_out'}},
            {'label': 'two', 'name': 'text_files', 'dataset': {**dataset, 'part': 'held_out'}},
        ],
        'eval_interval': '3ba',
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-2},
        'scheduler': {'name': 'constant'},
    }


def write_yaml(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / 'tiny.yaml'
    OmegaConf.save(OmegaConf.create(settings), path)
    return str(path)
