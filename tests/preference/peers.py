# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's DPO trainer as another process, in an environment of its own: `make test-trl` makes it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name('trl_peer.py')
NO_TRL = 'make test-trl installs TRL'
TIMEOUT = 300.0


def trl_python() -> Path | None:
    """The interpreter of TRL's environment, or None where there is none.

    Raises:
        FileNotFoundError: If ``TRL_PYTHON`` names one that does not exist; a test that skipped then would hide it.
    """
    named = os.environ.get('TRL_PYTHON')
    # Not resolved: the interpreter of an environment is a link, and knows the environment by where the link lies.
    python = Path(named or ROOT / '.venv-trl/bin/python').absolute()
    if python.exists():
        return python
    if named:
        raise FileNotFoundError(f'TRL_PYTHON names {named}, which does not exist.')
    return None


def smoothed_sigmoid(label_smoothing: float) -> dict[str, Any]:
    r"""The settings by which TRL computes -(1 - eps) log sigma(beta h) - eps log sigma(-beta h).

    TRL 1.16 has this loss under no name: its ``sigmoid`` takes no note of ``label_smoothing``, and its ``robust``
    subtracts the term of eps and divides by 1 - 2 eps. The two of them together, with these weights, are it.
    """
    return {
        'loss_type': ['sigmoid', 'robust'],
        'loss_weights': [2 * (1 - label_smoothing), 2 * label_smoothing - 1],
        'label_smoothing': label_smoothing,
    }


def run_trl(folder: Path, settings: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains with TRL and returns the loss of every step and the reference's weights at the end.

    Args:
        folder (Path): Where the settings and all that the run writes go, ``policy.safetensors`` among it.
        settings (dict): ``model``, a Hugging Face folder; ``pairs``, a JSONL file of ``prompt_ids``, ``chosen_ids`` and
            ``rejected_ids`` in the order of their use; ``batch_size``, ``steps``, ``learning_rate``, ``beta``,
            ``loss_type``, ``label_smoothing`` and, if ``loss_type`` is a list, ``loss_weights``, as TRL takes them;
            ``bema``, the arguments of TRL's ``BEMACallback`` or None.

    Raises:
        RuntimeError: If the run fails, with the end of what it said, or if there is no TRL.
    """
    python = trl_python()
    if python is None:
        raise RuntimeError(f'There is no TRL here: {NO_TRL}.')
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / 'settings.json'
    settings_file.write_text(json.dumps(settings, default=str))
    # Isolated (-I), so that a PYTHONPATH that is meant for this environment does not reach the other one.
    done = subprocess.run(
        [python, '-I', SCRIPT, settings_file, folder],
        env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f'{SCRIPT.name} failed with exit code {done.returncode}:\n{done.stderr[-4000:]}')
    return json.loads((folder / 'losses.json').read_text()), load_file(folder / 'reference.safetensors')
