# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What an average in host memory costs the training of a model on a GPU.

    python benchmarks/offload.py                    bf16 weights, 16k tokens a step
    python benchmarks/offload.py --dtype float32    fp32 weights under autocast, which are twice as much to copy

A transformer of a billion parameters is trained without an average, with BEMA beside the weights, and with BEMA in host
memory, in turns on one model. Ten steps are measured at a time, of which one updates; a ratio is that of the medians.
While nothing trains are measured the copying of the weights to the host, which training waits for, and the whole update
that begins with it, which training waits for only where it takes longer than ten steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

from composer_bema import functional as cf
from composer_bema.averaging.offload import Staging

UPDATE_FREQ = 10
HEADS = 16


class Block(torch.nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.attention = torch.nn.Linear(width, 3 * width, bias=False)
        self.projection = torch.nn.Linear(width, width, bias=False)
        self.up = torch.nn.Linear(width, hidden, bias=False)
        self.down = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length, width) to the same."""
        queries, keys, values = self.attention(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(torch.nn.Module):
    """A decoder that returns its loss; of 1.0 billion parameters by default."""

    def __init__(self, layers: int = 22, width: int = 2048, hidden: int = 5632, vocabulary: int = 32000) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.blocks = torch.nn.Sequential(*(Block(width, hidden) for _ in range(layers)))
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length) to a loss."""
        logits = self.head(self.blocks(self.embedding(tokens)))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class Training:
    """Steps of one model, with or without averages of it."""

    def __init__(self, model: torch.nn.Module, vocabulary: int, batch: int, length: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.tokens = torch.randint(vocabulary, (batch, length), device=self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.averages: dict[str, cf.LoopState | None] = {
            'none': None,
            'on the device': cf.init_bema(model, update_freq=UPDATE_FREQ),
            'in host memory': cf.init_bema(model, update_freq=UPDATE_FREQ, device='cpu'),
        }

    def step(self, average: cf.LoopState | None) -> None:
        """Makes one step."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if average is not None:
            cf.compute_bema(self.model, average)

    def seconds_a_step(self, name: str, windows: int) -> list[float]:
        """Returns the seconds of a step in each of a number of windows, after one that is not measured."""
        average = self.averages[name]
        taken = []
        for _ in range(1 + windows):
            taken.append(seconds(lambda: [self.step(average) for _ in range(UPDATE_FREQ)]) / UPDATE_FREQ)
        if average is not None:
            # What is under way belongs to this average, not to what is measured next.
            average.average()
        return taken[1:]


def seconds(action: Callable[[], object]) -> float:
    """Returns what an action takes, until all that it has enqueued is done."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    start = time.perf_counter()
    action()
    finish()
    return time.perf_counter() - start


def measure(training: Training, repeats: int, windows: int) -> dict[str, float]:
    """Trains with each of the averages in turn; returns seconds and ratios."""
    steps: dict[str, list[float]] = {name: [] for name in training.averages}
    for _ in range(repeats):
        for name, taken in steps.items():
            taken += training.seconds_a_step(name, windows)
    medians = {name: statistics.median(taken) for name, taken in steps.items()}
    result = {f'a step, average {name}, s': median for name, median in medians.items()}
    return result | {f'average {name} / none': median / medians['none'] for name, median in medians.items()}


def measure_alone(training: Training, repeats: int) -> dict[str, float]:
    """Measures the parts of an update in host memory."""
    state, weights, staging = training.averages['in host memory'], list(training.model.parameters()), Staging()
    assert state is not None, 'it is the one with an average'
    staging.copy(weights)
    copying = [seconds(lambda: staging.copy(weights)) for _ in range(repeats)]
    updating = [seconds(lambda: (state.update(training.model, state.step), state.average())) for _ in range(repeats)]
    return {
        'copying the weights to the host, s': statistics.median(copying),
        'an update in host memory, s': statistics.median(updating),
    }


def main() -> None:
    """Measures, and prints a table; the numbers are in a JSON file too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dtype', choices=('bfloat16', 'float32'), default='bfloat16', help='Of the weights.')
    parser.add_argument('--batch', type=int, default=8, help='Sequences a step.')
    parser.add_argument('--length', type=int, default=2048, help='Tokens a sequence.')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--windows', type=int, default=4, help='Times ten steps, for each average, in each repeat.')
    parser.add_argument('--json', type=Path, default=Path('runs/benchmarks/offload.json'))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('There is no GPU here, and this is about models on one: nothing was measured.')
    torch.manual_seed(0)
    model = Transformer().to('cuda', getattr(torch, options.dtype))
    training = Training(model, model.embedding.num_embeddings, options.batch, options.length)
    result = {
        'GPU': torch.cuda.get_device_name(),
        'threads': torch.get_num_threads(),
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'dtype': options.dtype,
        'tokens a step': options.batch * options.length,
        **measure(training, options.repeats, options.windows),
        **measure_alone(training, options.repeats),
    }
    print(tabulate(result.items(), floatfmt='.4f'))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
