# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the measurements of cost share: models of real shapes, fresh processes, medians, tables and their files."""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from tabulate import tabulate

Row = dict[str, Any]
Result = TypeVar('Result')


class Weights(torch.nn.Module):
    """Parameters of given shapes, and nothing that could be run."""

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty(shape, dtype=dtype).uniform_(-1, 1) for shape in shapes)


def gpt2_shapes() -> list[torch.Size]:
    """The shapes of GPT-2 small's parameters, 124 million."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device('meta'):
        return [parameter.shape for parameter in GPT2LMHeadModel(GPT2Config()).parameters()]


def billion_shapes() -> list[torch.Size]:
    """The shapes of Pythia-1B's parameters, 1.01 billion."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {
        'vocab_size': 50304,
        'hidden_size': 2048,
        'num_hidden_layers': 16,
        'num_attention_heads': 8,
        'intermediate_size': 8192,
    }
    with torch.device('meta'):
        return [parameter.shape for parameter in GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).parameters()]


def adapter_shapes() -> list[torch.Size]:
    """The shapes of four thousand small tensors, as low-rank adapters have, 49 million parameters."""
    return [torch.Size((16, 768))] * 4000


MODELS: dict[str, Callable[[], list[torch.Size]]] = {
    '124m': gpt2_shapes,
    '1b': billion_shapes,
    'adapters': adapter_shapes,
}
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}


def make_weights(model: str, dtype: str) -> Weights:
    """A model of random weights."""
    torch.manual_seed(0)
    return Weights(MODELS[model](), DTYPES[dtype])


def num_parameters(model: torch.nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def available_memory() -> int:
    """The bytes that the system can give without taking any from somebody."""
    lines = Path('/proc/meminfo').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable:')) * 1024


def in_fresh_process(
    function: Callable[..., Result], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Result:
    """What a function returns in a process of its own.

    Args:
        function: A function of a module.
        arguments: Its arguments.
        environment: Variables that the process gets on top of ours.
    """
    context = multiprocessing.get_context('spawn')
    with mock.patch.dict(os.environ, environment or {}), ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Keeps one core busy for a block, as another program's waiting OpenMP thread does."""
    process = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(action: Callable[[], object]) -> float:
    """The wall-clock time that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over pairs of things that were measured one after the other."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile, between which half of the values are."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method='inclusive')
    return lower, upper


def machine() -> Row:
    """What the numbers depend on, for the files that they are kept in."""
    cpu = Path('/proc/cpuinfo')
    models = [line.partition(':')[2].strip() for line in cpu.read_text().splitlines() if line.startswith('model name')]
    return {
        'processor': models[0] if models else platform.processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'python': platform.python_version(),
    }


def markdown(rows: Sequence[Mapping[str, Any]], digits: int = 2) -> str:
    """A Markdown table of rows; what a row lacks is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_as_text(row.get(column), digits) for column in columns] for row in rows]
    align = ['left', *['right'] * (len(columns) - 1)]
    return tabulate(cells, columns, tablefmt='pipe', disable_numparse=True, colalign=align) + '\n'


def _as_text(value: Any, digits: int) -> str:
    if value is None:
        return ''
    return f'{value:.{digits}f}' if isinstance(value, float) else str(value)


def save(out: Path, name: str, tables: str, results: Mapping[str, Any]) -> None:
    """Prints the tables, and writes them and the results that they come from."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{name}.md').write_text(tables, encoding='utf-8')
    (out / f'{name}.json').write_text(json.dumps({'machine': machine(), **results}, indent=2) + '\n', encoding='utf-8')
    print(tables)
