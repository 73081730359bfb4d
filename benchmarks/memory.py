# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The bytes a parameter that an average takes: kept, and for a while during an update and while it is in the model.

    python benchmarks/memory.py

It prints the table of docs/performance.md, for GPT-2 small. Every number is the kernel's own count for a process that
does nothing else: resident anonymous memory after the average was taken, less that before; and the high-water mark
during an update, or from putting the average into the model to taking it out again, less what is resident at rest. The
allocator is told to give back at once what is freed.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
from measuring import Row, Weights, in_fresh_process, make_weights, markdown, num_parameters, save
from peers import BEMA_RULE, OUR_OTHERS, OURS, Method, others, ours

MODEL = '124m'

# A threshold that is given does not grow with what was freed, and so all of a large tensor goes back.
PROMPT_MALLOC = {'MALLOC_MMAP_THRESHOLD_': str(2**16), 'MALLOC_TRIM_THRESHOLD_': str(2**16)}

WEIGHTS = ('fp32', 'fp32 from bf16', 'bf16')
"""The dtype of the weights; the second are those of a model that was loaded from bf16 weights to be trained in fp32."""


def methods() -> list[Method]:
    """What is measured: the settings of ours that differ in memory, and others."""
    mine = [method for method in OURS if 'no guard' not in method.name]
    return [*mine, ours("BEMA, device='cpu'", BEMA_RULE, 'bema', device='cpu'), *OUR_OTHERS, *others()]


def make_model(weights: str) -> Weights:
    """GPT-2 small's parameters, as one of ``WEIGHTS``."""
    dtype, _, source = weights.partition(' from ')
    model = make_weights(MODEL, dtype)
    if source:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    return model


def measure(name: str, weights: str) -> Row:
    """The bytes a parameter of a method, in this process, which has to be a fresh one."""
    method = next(method for method in methods() if method.name == name)
    model = make_model(weights)
    _warm_up(method)
    before = _resident()
    kept = method.keep(model)
    kept.update()
    gc.collect()
    row: Row = {'kept': _resident() - before, 'update': _peak(kept.update)}
    if kept.swap_in is not None and kept.swap_out is not None:
        row['swap'] = _peak(kept.swap_in, kept.swap_out)
    return {column: value / num_parameters(model) for column, value in row.items()}


def _warm_up(method: Method) -> None:
    """Lets libraries and threads take the memory that they take once."""
    tiny = Weights([torch.Size((256, 256))] * 2, torch.float32)
    kept = method.keep(tiny)
    for action in (kept.update, kept.swap_in, kept.swap_out):
        if action is not None:
            action()
    gc.collect()


def _resident() -> int:
    return _status('RssAnon')


def _peak(*actions: Callable[[], object]) -> int:
    """The most that is resident during actions, above what is before."""
    # Sets the high-water mark to what is resident now.
    Path('/proc/self/clear_refs').write_text('5')
    start = _status('VmHWM')
    for action in actions:
        action()
    return _status('VmHWM') - start


def _status(field: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{field}:')) * 1024


def table(results: dict[str, dict[str, Row]]) -> str:
    """A row a method; the columns are the numbers for each of the weights.

    Args:
        results: What :func:`measure` returned, by method and weights.
    """
    columns = {'kept': 'kept', 'update': 'more in an update', 'swap': 'more while swapped'}
    return markdown(
        [
            {
                '': name,
                **{f'{weights}: {columns[c]}': row.get(c) for weights, row in by_weights.items() for c in columns},
            }
            for name, by_weights in results.items()
        ],
        digits=1,
    )


@click.command(context_settings={'show_default': True})
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='runs/benchmarks')
def main(out: Path) -> None:
    """Measure the memory of every method, and print a table."""
    results: dict[str, dict[str, Row]] = {}
    for method in methods():
        print(method.name, file=sys.stderr)
        results[method.name] = {
            weights: in_fresh_process(measure, method.name, weights, environment=PROMPT_MALLOC) for weights in WEIGHTS
        }
    title = f'Bytes a parameter, {MODEL}'
    save(out, 'memory', f'{title}\n\n{table(results)}', {'title': title, 'rows': results})


if __name__ == '__main__':
    main()
