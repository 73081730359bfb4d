# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the pages take for granted: names in their Python blocks, and folders that their commands read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.models import ComposerClassifier, HuggingFaceModel
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from composer_bema import BEMA
from composer_bema.training.data.toy_preferences import build_toy_preferences
from composer_bema.training.tokenizers import build_byte_tokenizer

__all__ = ['TRAINER_RUN', 'make_checkpoints', 'make_trainer_run', 'namespace_of']

# The folder of a run of somebody's own.
TRAINER_RUN = 'runs/mine/checkpoints'

_SIZES = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2}


def namespace_of(page: Path) -> dict[str, Any]:
    """The names that the Python blocks of a page begin with."""
    return _of_preferences() if page.name == 'preference.md' else _of_a_classifier()


def _of_a_classifier() -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = torch.randn(320, 8)
    data = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    model = ComposerClassifier(layers, num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(model: ComposerClassifier, batch: Any) -> None:
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()

    def evaluate(model: ComposerClassifier) -> float:
        return float(sum(model.loss(model(batch), batch) for batch in loader))

    loader = DataLoader(data, batch_size=8)
    return {
        'model': model,
        'loader': loader,
        'train_dataloader': loader,
        'eval_dataloader': DataLoader(data, batch_size=64),
        'train_step': train_step,
        'evaluate': evaluate,
    }


def _of_preferences() -> Mapping[str, Any]:
    tokenizer = build_byte_tokenizer()
    source = build_toy_preferences(tokenizer, max_seq_len=128)
    loader = DataLoader(source.dataset, batch_size=4, collate_fn=source.collate)
    return {'model': _language_model(0), 'tokenizer': tokenizer, 'loader': loader}


def _language_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, vocab_size=259, max_position_embeddings=512, eos_token_id=1))


def make_checkpoints(folder: Path) -> None:
    """``checkpoints`` and ``base``: a run of transformers' trainer, and what it started from. And a sweep's YAML."""
    tokenizer = build_byte_tokenizer()
    for seed, name in enumerate(('base', *(f'checkpoints/checkpoint-{step}' for step in (400, 800, 1200)))):
        _language_model(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / 'sweep.yaml').write_text('{initial_model: base, averages: {rule: ema, half_life: [400, 800]}, write: {}}')


def make_trainer_run(folder: Path) -> None:
    """The checkpoints of a Trainer in Python: of a language model, one every two steps of six."""
    tokens = torch.randint(3, 259, (24, 16))
    rows = [{'input_ids': row, 'labels': row, 'attention_mask': torch.ones_like(row)} for row in tokens]
    model = HuggingFaceModel(_language_model(0), build_byte_tokenizer(), use_logits=True)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(rows, batch_size=4),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        max_duration='6ba',
        algorithms=[BEMA('2ba')],
        save_folder=str(folder / TRAINER_RUN),
        save_interval='2ba',
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
