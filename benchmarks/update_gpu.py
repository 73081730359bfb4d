# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What an update of an average on a GPU costs, beside copying as many bytes there: ours, and torch's own.

    python benchmarks/update_gpu.py                    124M and 1.1B parameters, in fp32 and bf16
    python benchmarks/update_gpu.py --model 124m --json update_gpu.json

Bandwidth is what a method has to read and write, divided by its time on the device, as a part of what a copy of one
GiB on the same device reaches. Buffers are fp32, and theta_0 is as the weights are; torch's AveragedModel keeps its
average as the weights are. The host's time is that of a call until it returns, with the device idle before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from offline import MODELS, shapes
from tabulate import tabulate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from composer_bema.averaging import kernels
from composer_bema.averaging.rules import Difference, Lerp, LinearStep

ALPHA, BETA = 0.2, 0.01
EMA = LinearStep((Lerp('ema', 'theta', BETA),), {})
BEMA = LinearStep((Lerp('ema', 'theta', BETA), Difference('bema', 'ema', ALPHA, 'theta', 'theta_0')), {})
COPIED = 2**30  # bytes
FP32 = 4  # bytes


class Method(NamedTuple):
    """Something to measure."""

    name: str
    run: Callable[[], object]
    streams: int
    """The bytes a parameter that it has to read and write."""


def make_tensors(model: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns random weights of the model's shapes."""
    return [torch.randn(shape, device='cuda', dtype=dtype) for _, shape in shapes(**MODELS[model])]


def ours(theta: list[torch.Tensor]) -> Iterator[Method]:
    """Yields our kernels, if Triton works here, and the fallback for where it does not."""
    fused = kernels._fused() is not None
    size = theta[0].element_size()
    theta_0 = [tensor.clone() for tensor in theta]
    ema, bema = ([tensor.to(torch.float32, copy=True) for tensor in theta] for _ in range(2))
    for name, step, buffers, streams in (
        ('EMA', EMA, {'ema': ema}, size + 2 * FP32),
        ('BEMA', BEMA, {'theta_0': theta_0, 'ema': ema, 'bema': bema}, 2 * size + 3 * FP32),
    ):
        if fused:
            yield Method(f'{name}, fused', lambda s=step, b=buffers: kernels.apply_step(s, theta, b), streams)
        yield Method(f'{name}, _foreach', lambda s=step, b=buffers: _without_triton(s, theta, b), streams)
    if fused:
        yield Method('non-finite guard, fused', lambda: kernels.first_nonfinite(theta), size)
        yield Method('exchange of fp32, fused', lambda: kernels.exchange(ema, bema), 4 * FP32)


def _without_triton(step: LinearStep, theta: list[torch.Tensor], buffers: dict[str, list[torch.Tensor]]) -> None:
    with mock.patch.object(kernels, '_fused', lambda: None):
        kernels.apply_step(step, theta, buffers)


def torchs(theta: list[torch.Tensor]) -> Iterator[Method]:
    """Yields torch's own EMA."""
    model = torch.nn.Module()
    for index, tensor in enumerate(theta):
        model.register_parameter(str(index), torch.nn.Parameter(tensor))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - BETA))
    # Its first update copies.
    averaged.update_parameters(model)
    yield Method('EMA, torch AveragedModel', lambda: averaged.update_parameters(model), 3 * theta[0].element_size())


def measure(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Returns the median times on the device and of the host, in seconds. The first two runs do not count."""
    device, host = [], []
    for _ in range(2 + repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        before.record()
        run()
        after.record()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        device.append(before.elapsed_time(after) / 1000)
    return statistics.median(device[2:]), statistics.median(host[2:])


def copy_bandwidth(repeats: int) -> float:
    """Returns the bytes a second that a copy on the device reads and writes."""
    source, target = (torch.ones(COPIED, device='cuda', dtype=torch.uint8) for _ in range(2))
    seconds, _ = measure(lambda: target.copy_(source), repeats)
    return 2 * COPIED / seconds


def measure_model(model: str, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """Returns a row of the table for each method."""
    theta = make_tensors(model, dtype)
    parameters = sum(tensor.numel() for tensor in theta)
    bandwidth = copy_bandwidth(repeats)
    rows = []
    for methods in (ours, torchs):
        for method in methods(theta):
            seconds, host = measure(method.run, repeats)
            rows.append(
                {
                    'model': model,
                    'weights': str(dtype).removeprefix('torch.'),
                    'method': method.name,
                    'ms': 1000 * seconds,
                    'of the bandwidth of a copy': parameters * method.streams / seconds / bandwidth,
                    'host, ms': 1000 * host,
                    'copy, GB/s': bandwidth / 1e9,
                }
            )
    return rows


def main() -> None:
    """Measures and prints a table; the numbers are in a JSON file too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=MODELS, action='append', help='[default: all]')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--json', type=Path, help='A file for the numbers.')
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('This measures updates on a GPU, and torch finds none here.')
    rows = [
        row
        for model in options.model or MODELS
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure_model(model, dtype, options.repeats)
    ]
    print(torch.cuda.get_device_name(), f'torch {torch.__version__}', sep=', ')
    print(tabulate(rows, headers='keys', floatfmt='.2f'))
    if options.json:
        options.json.write_text(json.dumps({'device': torch.cuda.get_device_name(), 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
