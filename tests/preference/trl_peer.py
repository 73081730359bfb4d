# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Runs TRL's DPO trainer with its BEMA callback; `peers.py` starts it with the interpreter of TRL's own environment.

    python trl_peer.py SETTINGS.json OUT_FOLDER

It imports nothing of composer_bema or of its tests, for TRL wants other versions of the libraries than they do.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig
from trl.experimental.bema_for_ref_model import BEMACallback, DPOTrainer


class TokenTrainer(DPOTrainer):
    """TRL's trainer, given token ids, that keeps the loss of every step unrounded."""

    losses: list[float]

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        # TRL tokenizes whatever it is given; these columns are what it would make, and what its collator reads.
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def read_pairs(settings: dict[str, Any]) -> Dataset:
    """The pairs that the steps use, which may be no fewer: TRL would begin again at the first."""
    pairs = [json.loads(line) for line in Path(settings['pairs']).read_text().splitlines()]
    needed = settings['steps'] * settings['batch_size']
    if len(pairs) < needed:
        raise ValueError(f'{settings["steps"]} steps need {needed} pairs, and there are {len(pairs)}.')
    return Dataset.from_list(pairs[:needed])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that tokenizes nothing: TRL asks it for the padding token only."""
    vocabulary = WordLevel({'<pad>': 0}, unk_token='<pad>')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), pad_token='<pad>', eos_token='<pad>')


def make_config(settings: dict[str, Any], out: Path) -> DPOConfig:
    """Plain AdamW in fp32 on the CPU, over the pairs in their order."""
    return DPOConfig(
        output_dir=str(out / 'trainer'),
        per_device_train_batch_size=settings['batch_size'],
        max_steps=settings['steps'],
        train_sampling_strategy='sequential',
        max_length=None,
        beta=settings['beta'],
        loss_type=settings['loss_type'],
        loss_weights=settings.get('loss_weights'),
        label_smoothing=settings['label_smoothing'],
        learning_rate=settings['learning_rate'],
        lr_scheduler_type='constant',
        optim='adamw_torch',
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        # Zero switches clipping off.
        max_grad_norm=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy='no',
        logging_strategy='no',
        report_to='none',
        disable_tqdm=True,
    )


def run(settings: dict[str, Any], out: Path) -> TokenTrainer:
    """Trains as the settings say; the reference is TRL's own copy of the model."""
    callbacks = []
    if settings['bema'] is not None:
        callbacks = [BEMACallback(**settings['bema'], device='cpu', update_ref_model=True)]
    trainer = TokenTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings['model'], dtype=torch.float32),
        args=make_config(settings, out),
        train_dataset=read_pairs(settings),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )
    trainer.losses = []
    trainer.train()
    return trainer


def save_weights(model: torch.nn.Module, file: Path) -> None:
    """Writes the state dict; safetensors takes no tensors that share their memory, as tied ones do."""
    save_file({key: value.detach().clone() for key, value in model.state_dict().items()}, file)


def main() -> None:
    """Reads the settings, trains, and writes the losses and the weights."""
    settings_file, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    trainer = run(json.loads(settings_file.read_text()), out)
    (out / 'losses.json').write_text(json.dumps(trainer.losses))
    save_weights(trainer.accelerator.unwrap_model(trainer.ref_model), out / 'reference.safetensors')
    save_weights(trainer.accelerator.unwrap_model(trainer.model), out / 'policy.safetensors')


if __name__ == '__main__':
    main()
