# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What averaging a directory of checkpoints costs, beside reading and copying the same bytes.

    python benchmarks/offline.py                          ten checkpoints of 124M fp32 parameters, 10 GB of disk
    python benchmarks/offline.py --model 1b --repeats 1   ten checkpoints of 1.1B bf16 parameters, 40 GB of disk

It prints the tables of docs/offline.md. A ratio is the median over repeats, of two things that were measured one after
the other. Memory is what a fresh process has above what it has when everything is imported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate

from composer_bema.offline.plan import Average
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import write_averages
from composer_bema.offline.sweep import expand_grid
from composer_bema.offline.trajectory import Trajectory

NUM_CHECKPOINTS = 10
# GPT-2's shape, and that of a Llama of about a billion parameters.
MODELS = {
    '124m': {'dtype': torch.float32, 'layers': 12, 'width': 768, 'hidden': 3072, 'vocabulary': 50257},
    '1b': {'dtype': torch.bfloat16, 'layers': 22, 'width': 2048, 'hidden': 5632, 'vocabulary': 32000},
}
ONE = Setting('bema', {'bias_power': 0.2}, update_after=100)
EIGHT = expand_grid({'rule': 'bema', 'ema_power': [0.2, 0.3, 0.4, 0.5], 'bias_power': [0.1, 0.2], 'update_after': 100})


class Nowhere:
    """Takes averages and forgets them."""

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Takes the values of a tensor."""


def make_checkpoints(folder: Path, model: str) -> int:
    """Writes checkpoints of a random walk; returns the parameters of the model."""
    shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator).to(shape['dtype']) for n, s in shapes(**shape)}
    for step in range(1, NUM_CHECKPOINTS + 1):
        target = folder / f'checkpoint-{100 * step}'
        target.mkdir(parents=True)
        for tensor in weights.values():
            tensor.mul_(1.01)
        save_file(weights, target / 'model.safetensors')
    return sum(tensor.numel() for tensor in weights.values())


def shapes(layers: int, width: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Yields names and shapes of a transformer's weights."""
    del dtype
    yield 'embedding', (vocabulary, width)
    for layer in range(layers):
        yield f'{layer}.attention', (width, 3 * width)
        yield f'{layer}.projection', (width, width)
        yield f'{layer}.up', (width, hidden)
        yield f'{layer}.down', (hidden, width)
        yield f'{layer}.norm', (width,)


def average_into_nowhere(folder: Path, settings: list[Setting]) -> None:
    """Averages without writing anything."""
    trajectory = Trajectory(folder)
    averages = [average for setting in settings for average in trajectory.plan(setting)]
    reading = trajectory.open(averages)
    reading.compute([Nowhere() for _ in averages], torch.get_num_threads())


def average_into_files(folder: Path, out: Path, settings: list[Setting]) -> None:
    """Averages and writes, as ``composer-bema stabilize`` and ``sweep`` do."""
    trajectory = Trajectory(folder)
    averages: dict[str, Average] = {}
    for setting in settings:
        averages[str(setting).replace(' ', ',')] = trajectory.plan(setting)[0]
    write_averages(trajectory, averages, out)


def load_everything(folder: Path, out: Path) -> None:
    """The loop that comes to mind first: a whole checkpoint at a time."""
    coefficients = Trajectory(folder).plan(ONE)[0].coefficients.tolist()
    total: dict[str, torch.Tensor] = {}
    for step, coefficient in enumerate(coefficients, start=1):
        for name, tensor in load_file(folder / f'checkpoint-{100 * step}' / 'model.safetensors').items():
            if name in total:
                total[name].add_(tensor.float(), alpha=coefficient)
            else:
                total[name] = tensor.float() * coefficient
    out.mkdir()
    save_file(total, out / 'model.safetensors')


def cat(folder: Path) -> None:
    """Reads all checkpoints and throws them away."""
    files = sorted(map(str, folder.glob('*/model.safetensors')))
    with open(os.devnull, 'wb') as nowhere:
        subprocess.run(['cat', *files], stdout=nowhere, check=True)


def write_plainly(out: Path, size: int, count: int) -> None:
    """Writes as many bytes into as many files."""
    content = bytes(2**20)
    out.mkdir()
    for index in range(count):
        with (out / str(index)).open('wb', buffering=0) as file:
            for _ in range(size // len(content)):
                file.write(content)
            file.write(content[: size % len(content)])


def copy(model: Path, out: Path) -> None:
    """Copies a file into a new folder."""
    out.mkdir()
    shutil.copyfile(model, out / 'copy')


def seconds(action: Callable[[], None], written: Path | None = None) -> float:
    """Returns what an action takes, and removes what it has written."""
    start = time.perf_counter()
    action()
    taken = time.perf_counter() - start
    if written is not None:
        shutil.rmtree(written)
    return taken


def measure_one(folder: Path, out: Path) -> dict[str, float]:
    """Measures one setting beside what it is compared with; returns ratios and seconds."""
    model = folder / 'checkpoint-100' / 'model.safetensors'
    os.sync()
    reading = seconds(lambda: cat(folder))
    averaging = seconds(lambda: average_into_nowhere(folder, [ONE]))
    copying = seconds(lambda: copy(model, out), out)
    both = seconds(lambda: average_into_files(folder, out, [ONE]), out)
    plain = seconds(lambda: load_everything(folder, out), out)
    return {
        'cat of the checkpoints, s': reading,
        'copy of one model, s': copying,
        'averaging / cat': averaging / reading,
        'averaging and writing / (cat + copy)': both / (reading + copying),
        'a loop that loads everything / (cat + copy)': plain / (reading + copying),
    }


def measure_sweep(folder: Path, out: Path) -> dict[str, float]:
    """Measures eight settings, written, beside reading the checkpoints and writing as many bytes."""
    size = (folder / 'checkpoint-100' / 'model.safetensors').stat().st_size
    os.sync()
    reading = seconds(lambda: cat(folder))
    writing = seconds(lambda: write_plainly(out, size, len(EIGHT)), out)
    os.sync()
    sweep = seconds(lambda: average_into_files(folder, out, EIGHT), out)
    return {
        'plain write of eight models, s': writing,
        'eight settings, written / (cat + plain write)': sweep / (reading + writing),
    }


def anonymous_memory(folder: Path, out: Path, settings: list[Setting]) -> int:
    """Returns the most anonymous memory that averaging and writing takes, in bytes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
        return process.submit(_watched, folder, out, settings).result()


def _watched(folder: Path, out: Path, settings: list[Setting]) -> int:
    start, most, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        average_into_files(folder, out, settings)
    finally:
        done.set()
        watcher.join()
        shutil.rmtree(out)
    return most[0]


def _anonymous() -> int:
    (line,) = (line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('RssAnon'))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Makes checkpoints, measures, and prints a table; the numbers are in a JSON file too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=MODELS, default='124m')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--folder', type=Path, help='Where to make the checkpoints.  [default: a temporary folder]')
    parser.add_argument('--json', type=Path, help='A file for the numbers.')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / 'checkpoints'
        parameters = make_checkpoints(folder, options.model)
        out = Path(temporary) / 'out'
        cat(folder)
        result = {}
        for measure in (measure_one, measure_sweep):
            runs = [measure(folder, out) for _ in range(options.repeats)]
            result |= {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for name, settings in (('one setting', [ONE]), ('eight settings', EIGHT)):
            most = anonymous_memory(folder, out, settings)
            result[f'anonymous memory, {name}, MiB'] = most / 2**20
    print(f'{NUM_CHECKPOINTS} checkpoints of {parameters / 1e6:.0f}M parameters, {torch.get_num_threads()} threads')
    print(tabulate(result.items(), floatfmt='.2f'))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
