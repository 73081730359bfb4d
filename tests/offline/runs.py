# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Trajectories of tiny real runs, saved every two steps, in every format that is read, and the averages kept online."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from composer import Algorithm
from safetensors.torch import save_file

from composer_bema import BEMA, DEMA, EMA, LAWA, OUEMA, SWAWindow
from tests.distributed import programs
from tests.distributed.programs import Topology
from tests.formats.runs import make_loader, make_model, save_in_parts, weights_of

STEPS = range(2, 13, 2)


class Run(NamedTuple):
    """A run's checkpoints, and what its weights were, by step and by ``training`` or the class of an average."""

    checkpoints: Path
    weights: dict[int, dict[str, dict[str, torch.Tensor]]]

    @property
    def initial_model(self) -> str:
        """The model before the first step, as a Hugging Face folder."""
        return str(self.checkpoints.parent / 'initial')


_RUNS: dict[str, dict[str, Any]] = {
    # The model of a checkpoint holds BEMA.
    'average': {'algorithms': [lambda: BEMA('2ba')]},
    'training': {'algorithms': [lambda: BEMA('2ba', save_weights='training')]},
    'late': {'algorithms': [lambda: BEMA('2ba', update_after='4ba', lag=1, bias_power=0.4)]},
    'half-life': {'algorithms': [lambda: BEMA('2ba', half_life='5ba')]},
    'ema': {'algorithms': [lambda: EMA(smoothing=0.6, update_freq='2ba')]},
    'dema': {'algorithms': [lambda: DEMA('2ba', ema_power=0.3)]},
    'ouema': {'algorithms': [lambda: OUEMA('2ba', '4ba', bias_power=0.6)]},
    'lawa': {'algorithms': [lambda: LAWA('2ba', 3)]},
    'swa_window': {'algorithms': [lambda: SWAWindow('2ba', '8ba', '4ba')]},
    'none': {'algorithms': []},
    'bf16': {'algorithms': [lambda: BEMA('2ba')], 'dtype': 'bfloat16', 'tied': False, 'frozen': True},
    'lora': {'algorithms': [lambda: BEMA('2ba')], 'lora': True},
    # No Hugging Face model, and one with BatchNorm.
    'classifier': {'algorithms': [lambda: BEMA('2ba')]},
}


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix='trajectories-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def run(name: str) -> Run:
    """One of the runs above, in Composer's monolithic checkpoints; for the session, so that nobody may change it."""
    folder = _folder() / name
    arguments = dict(_RUNS[name])
    algorithms: list[Callable[[], Algorithm]] = arguments.pop('algorithms')
    patches = {}
    if name != 'classifier':
        model = make_model(**arguments)
        (model.model.get_base_model() if arguments.get('lora') else model.model).save_pretrained(folder / 'initial')
        patches = {'make_model': lambda *args: model, 'make_loader': lambda *args: make_loader()}
    with mock.patch.multiple(programs, **patches) if patches else mock.MagicMock():
        seen = programs.train(
            Topology(),
            look=weights_of,
            algorithms=algorithms,
            max_duration='12ba',
            save_folder=str(folder / 'checkpoints'),
            save_interval='2ba',
        )
    weights = {step: look for (event, step), look in seen.items() if event == 'batch_end'}
    return Run(folder / 'checkpoints', {0: seen['fit_start', 0], **weights})


def as_huggingface(source: Run, folder: Path, safe: bool = True, name: str = 'checkpoint-{}') -> Path:
    """The training weights of a run as folders that transformers writes, and what its Trainer leaves beside them."""
    model = make_model()
    for step in STEPS:
        target = folder / name.format(step)
        model.load_state_dict(source.weights[step]['training'])
        model.model.save_pretrained(target, safe_serialization=safe, max_shard_size='8KB')
        model.tokenizer.save_pretrained(target)
        (target / 'trainer_state.json').write_text('{}')
        torch.save({'step': step}, target / 'optimizer.pt')
    return folder


def as_safetensors(source: Run, folder: Path) -> Path:
    folder.mkdir()
    for step in STEPS:
        tensors = {n: tensor.clone() for n, tensor in source.weights[step]['training'].items()}
        save_file(tensors, folder / f'model-{step}.safetensors')
    return folder


def as_shards(source: Run, folder: Path) -> Path:
    """A run's checkpoints as two ranks would have saved them, as torch's own writer does."""
    for file in sorted(source.checkpoints.glob('ep*-rank0.pt')):
        save_in_parts(file, folder / file.name.removesuffix('-rank0.pt'))
    return folder


def as_compressed(source: Run, folder: Path) -> Path:
    folder.mkdir()
    for file in source.checkpoints.glob('ep*-rank0.pt'):
        with (folder / f'{file.name}.gz').open('wb') as target:
            subprocess.run(['gzip', '-c', str(file)], stdout=target, check=True)
    return folder
