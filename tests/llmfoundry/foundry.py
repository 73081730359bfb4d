# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""llm-foundry as another process, in an environment of its own: `make test-llmfoundry` makes it.

The runs are those of ``yamls/llmfoundry``, scaled down to what a CPU trains in seconds.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / 'yamls/llmfoundry').glob('*.yaml'))
TOKENIZER = ROOT / 'yamls/quickstart_model'
NO_LLM_FOUNDRY = 'make test-llmfoundry installs llm-foundry'
# In seconds; half of what a run takes is the import of llm-foundry.
TIMEOUT = 600.0
SEQUENCE_LENGTH = 32

# What makes any of the recipes small, and has its metrics written into files.
SMALL = {
    'tokenizer.name': TOKENIZER,
    'max_seq_len': SEQUENCE_LENGTH,
    'max_duration': '8ba',
    'global_train_batch_size': 4,
    'device_train_microbatch_size': 4,
    'device_eval_batch_size': 8,
    'precision': 'fp32',
    'variables.num_workers': 1,
    'eval_interval': '4ba',
    'save_interval': '4ba',
    'save_num_checkpoints_to_keep': -1,
    'callbacks.hf_checkpointer.save_interval': '4ba',
    'callbacks.hf_checkpointer.precision': 'float32',
    'python_log_level': 'info',
    'loggers.mlflow.tracking_uri': 'mlflow',
    'loggers.mlflow.experiment_name': 'test',
    'loggers.mlflow.log_system_metrics': 'false',
    'loggers.mlflow.synchronous': 'true',
}

# What makes MPT small.
SMALL_MPT = {
    'model.d_model': 16,
    'model.n_heads': 2,
    'model.n_layers': 2,
    'model.vocab_size': 320,
}


def foundry_bin() -> Path | None:
    """The folder with the commands of llm-foundry's environment, or None where there is none.

    Raises:
        FileNotFoundError: If ``LLMFOUNDRY_PYTHON`` names an interpreter that does not exist; a test that skipped then
            would hide it.
    """
    named = os.environ.get('LLMFOUNDRY_PYTHON')
    # Not resolved: the interpreter of an environment is a link, and knows the environment by where the link lies.
    python = Path(named or ROOT / '.venv-llmfoundry/bin/python').absolute()
    if python.exists():
        return python.parent
    if named:
        raise FileNotFoundError(f'LLMFOUNDRY_PYTHON names {named}, which does not exist.')
    return None


def run_command(command: str, *arguments: object, folder: Path) -> str:
    """Runs a command of llm-foundry's environment in a folder, and returns what it printed.

    Raises:
        RuntimeError: If it fails, with the end of what it said, or if there is no llm-foundry.
    """
    bin_folder = foundry_bin()
    if bin_folder is None:
        raise RuntimeError(f'There is no llm-foundry here: {NO_LLM_FOUNDRY}.')
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONNOUSERSITE': '1'}
    # Meant for the environment of the tests.
    environment.pop('PYTHONPATH', None)
    done = subprocess.run(
        [bin_folder / command, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f'{command} failed with exit code {done.returncode}:\n{done.stderr[-6000:]}')
    return done.stdout


def train(recipe: Path, folder: Path, overrides: Mapping[str, object]) -> None:
    """Trains in a folder by the command that the recipe opens with."""
    run_command('llmfoundry', 'train', recipe, *(f'{key}={value}' for key, value in overrides.items()), folder=folder)


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Composer's checkpoint, which the test itself had written."""
    return torch.load(file, map_location='cpu', weights_only=False)


def read_metrics(folder: Path) -> dict[str, dict[int, float]]:
    """What a run has logged, by name and step, from MLflow's folder of plain files."""
    (metrics,) = (folder / 'mlflow').glob('*/*/metrics')
    return {
        file.relative_to(metrics).as_posix(): {int(step): float(value) for _, value, step in _lines_of(file)}
        for file in metrics.rglob('*')
        if file.is_file()
    }


def read_hyperparameters(folder: Path) -> set[str]:
    """The names of the hyperparameters that a run has logged."""
    (parameters,) = (folder / 'mlflow').glob('*/*/params')
    return {file.relative_to(parameters).as_posix() for file in parameters.rglob('*') if file.is_file()}


def _lines_of(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()]
