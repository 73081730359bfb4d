# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""An evaluation from its target to its folder of results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Optional, Union

import torch

from composer_bema.evaluation.loss import LOSS
from composer_bema.evaluation.measurements import Measurement
from composer_bema.evaluation.results import Result, table_of, write_generations, write_results
from composer_bema.evaluation.suite import Suite
from composer_bema.evaluation.targets import Target
from composer_bema.formats.huggingface import new_folder
from composer_bema.formats.safetensors_files import write_json

__all__ = ['evaluate']

log = logging.getLogger(__name__)

PROTOCOL_FILE = 'protocol.json'


def evaluate(target: Target, suite: Suite, out: Union[str, Path], *, save_generations: bool = False) -> str:
    """Measures the tasks of a suite on every model of a target, and returns a table for people.

    Args:
        target (Target): What is evaluated, see :func:`.open_target`.
        suite (Suite): The tasks.
        out (str | Path): The folder to make, of ``results.jsonl``, a table, pictures, and how it was done. It is there
            when it is complete, and not before.
        save_generations (bool): Whether to write what was generated to ``generations.jsonl``. Default: ``False``.

    Raises:
        FileExistsError: If ``out`` is there and is not an empty folder.
        ValueError: If texts or questions cannot be read, or the weights are of another model.

    Example:
        >>> target = open_target('checkpoints', {'ema': Setting('ema')}, weights='training', device=torch.device('cpu'))
        >>> print(evaluate(target, Suite(['boolq'], Protocol('log-likelihood')), 'results'))
    """
    with new_folder(out) as folder:
        measure = suite.prepare(target.tokenizer, target.model)
        results = []
        for subject, model in target.models():
            measurements, generations = measure(model)
            results.append(Result(subject, measurements))
            log.info('%s%s: %s', subject.weights, _at(subject.step), _described(measurements, _tasks(suite, results)))
            if save_generations:
                write_generations(subject, generations, folder)
        tasks = _tasks(suite, results)
        write_results(results, tasks, folder)
        write_json(folder / PROTOCOL_FILE, _protocol(target, suite))
        files = ', '.join(str(Path(out) / path.name) for path in sorted(folder.iterdir()))
    return f'{table_of(results, tasks)}\n\n{files}'


def _tasks(suite: Suite, results: Sequence[Result]) -> list[str]:
    """Returns the tasks that count as ones: texts, and questions in the sets in which they were asked for."""
    measured = dict.fromkeys(m.task for _, measurements in results for m in measurements)
    return [task for task in measured if task in suite.questions or task.startswith(f'{LOSS}-')]


def _described(measurements: Sequence[Measurement], tasks: Sequence[str]) -> str:
    return ', '.join(f'{m.task} {m.metric} {m.value:.4f}' for m in measurements if m.task in tasks)


def _at(step: Optional[int]) -> str:
    return '' if step is None else f' at step {step}'


def _protocol(target: Target, suite: Suite) -> dict[str, Any]:
    """Returns what another person needs to know to measure the same."""
    device = target.model.device
    versions = ['composer_bema', 'torch', 'transformers', *(['lm_eval'] if suite.questions else [])]
    return {
        **target.given,
        'dtype': str(target.model.dtype).removeprefix('torch.'),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'tasks': list(suite.tasks),
        **suite.described(target.tokenizer),
        'batch_size': suite.batch_size,
        'versions': {name: metadata.version(name) for name in versions},
    }
