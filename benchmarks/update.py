# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What one update of an average costs, and a swap, beside copying as many bytes: ours and others'.

    python benchmarks/update.py                                   GPT-2 small in fp32 and bf16
    python benchmarks/update.py --model 1b --dtype bf16 --repeats 3

It prints the tables of docs/performance.md. The unit is the time that copying takes for the bytes that an fp32 average
has to read and write (an EMA of fp32 weights three times 4 a parameter, BEMA five times, a swap four times); a copy is
timed before each update, and a number is the median over repeats of an update's time in the unit. Each condition has a
process of its own:

as users run it          with the memory allocator as it is: a large temporary is new pages from the system each time
tuned malloc             an allocator that keeps what was freed, so that temporaries cost less
beside a busy process    as users run it, while another program keeps one of the cores busy
"""

import contextlib
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch
from measuring import (
    DTYPES,
    MODELS,
    Row,
    available_memory,
    busy_process,
    in_fresh_process,
    make_weights,
    markdown,
    median_ratio,
    num_parameters,
    save,
    seconds,
)
from peers import OURS, OURS_BY_TORCH_ALONE, Kept, others

# glibc then takes nothing from the system with mmap and gives nothing back.
TUNED_MALLOC = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**40), 'MALLOC_TOP_PAD_': str(2**28)}

USERS, TUNED, BUSY = 'as users run it', 'tuned malloc', 'beside a busy process'
CONDITIONS = (USERS, TUNED, BUSY)

# Elements of the arrays that are copied and added: far more than a cache holds.
COPIED = 64 * 1024 * 1024
FP32 = 4  # bytes


class Copying:
    """The machine's bandwidth, by a plain copy in memory."""

    def __init__(self) -> None:
        self._source, self._target = torch.rand(COPIED), torch.rand(COPIED)

    def seconds_a_byte(self) -> float:
        """What a byte that is read or written takes, measured now."""
        return seconds(lambda: self._target.copy_(self._source)) / (2 * FP32 * COPIED)

    def triad(self) -> float:
        """The same of ``a <- b + s c``, three streams."""
        third = torch.rand(COPIED)

        def once() -> None:
            torch.add(self._source, third, alpha=0.5, out=self._target)

        return statistics.median(seconds(once) for _ in range(5)) / (3 * FP32 * COPIED)


def streamed_bytes(action: str, kind: str, weight: int) -> int:
    """The bytes a parameter that an action has to read and write, with fp32 averages.

    Args:
        action: ``'update'``, ``'swap in'`` or ``'swap out'``.
        kind: ``'ema'`` or ``'bema'``.
        weight: The bytes of a weight. BEMA's theta_0 takes as many.
    """
    if action == 'update':
        return weight + 2 * FP32 if kind == 'ema' else 2 * weight + 3 * FP32
    if weight == FP32:
        return 4 * FP32
    # Into weights of 16 bits: they are put aside, and the average is rounded into their place; then they come back.
    return 3 * weight + FP32 if action == 'swap in' else 2 * weight


def measure(model_name: str, dtype: str, repeats: int) -> list[Row]:
    """The seconds that every method's actions took, and those of a byte copied right before, in this process."""
    model, copying = make_weights(model_name, dtype), Copying()
    copying.seconds_a_byte()
    rows: list[Row] = [{'method': 'triad', 'action': 'triad', 'seconds a byte': [copying.triad()]}]
    for method in [*OURS, *OURS_BY_TORCH_ALONE, *others()]:
        if method.copies * FP32 * num_parameters(model) > available_memory():
            print(f'{model_name} {dtype}: too little memory for {method.name}', file=sys.stderr)
            continue
        kept = method.keep(model)
        # The guard has no part in a swap.
        with_swaps = 'no guard' not in method.name
        for action, taken in _repeated(kept, copying, repeats, with_swaps).items():
            size = num_parameters(model) * streamed_bytes(action, method.kind, DTYPES[dtype].itemsize)
            row = {'method': method.name, 'kind': method.kind, 'action': action, 'bytes': size}
            rows.append({**row, 'seconds': [s for s, _ in taken], 'seconds a byte': [unit for _, unit in taken]})
        print(f'{model_name} {dtype}: {method.name}', file=sys.stderr)
        del kept
        gc.collect()
    return rows


def _repeated(kept: Kept, copying: Copying, repeats: int, with_swaps: bool) -> dict[str, list[tuple[float, float]]]:
    """For each action, the seconds that it took and those of a byte, after one round that does not count."""
    actions: dict[str, Callable[[], object]] = {'update': kept.update}
    if with_swaps and kept.swap_in is not None and kept.swap_out is not None:
        actions |= {'swap in': kept.swap_in, 'swap out': kept.swap_out}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for repeat in range(1 + repeats):
        for name, action in actions.items():
            unit = copying.seconds_a_byte()
            result = seconds(action), unit
            if repeat:
                taken[name].append(result)
    return taken


def in_units(row: Row) -> float:
    """The median over repeats of the time in the unit."""
    return median_ratio(row['seconds'], [unit * row['bytes'] for unit in row['seconds a byte']])


def table(results: dict[str, list[Row]]) -> str:
    """A table of one model: a row a method and action, and for each condition its time in the unit and in ours.

    Args:
        results: The rows of :func:`measure` by condition.
    """
    rows: list[Row] = []
    for first in next(iter(results.values()))[1:]:
        action = '' if first['action'] == 'update' else f', {first["action"]}'
        line: Row = {'': f'{first["method"]}{action}'}
        for condition, measured in results.items():
            found = _find(measured, first['method'], first['action'])
            line[condition] = None if found is None else in_units(found)
            line[f'{condition}, in ours'] = _in_ours(measured, first)
        line['ms'] = 1000 * statistics.median(first['seconds'])
        rows.append(line)
    copies = {'': 'copy, GB/s'}
    triads = {'': 'triad, GB/s'}
    for condition, measured in results.items():
        units = [unit for row in measured[1:] for unit in row['seconds a byte']]
        copies[condition] = f'{1e-9 / statistics.median(units):.1f}'
        triads[condition] = f'{1e-9 / measured[0]["seconds a byte"][0]:.1f}'
    return markdown([*rows, copies, triads])


def _find(rows: Sequence[Row], method: str, action: str) -> Row | None:
    return next((row for row in rows if (row['method'], row['action']) == (method, action)), None)


def _in_ours(measured: Sequence[Row], row: Row) -> float | None:
    """How many of ours, with its guard, would have been done meanwhile; None for ours, or where it was not measured."""
    if row['method'] in {method.name for method in [*OURS, *OURS_BY_TORCH_ALONE]}:
        return None
    theirs = _find(measured, row['method'], row['action'])
    mine = _find(measured, 'EMA' if row['kind'] == 'ema' else 'BEMA', row['action'])
    return None if theirs is None or mine is None else in_units(theirs) / in_units(mine)


def measure_under(condition: str, model: str, dtype: str, repeats: int) -> list[Row]:
    """The same in a process of its own, under one of the conditions."""
    beside = busy_process() if condition == BUSY else contextlib.nullcontext()
    with beside:
        return in_fresh_process(
            measure, model, dtype, repeats, environment=TUNED_MALLOC if condition == TUNED else None
        )


@click.command(context_settings={'show_default': True})
@click.option('--model', 'models', type=click.Choice(list(MODELS)), multiple=True, default=['124m'])
@click.option('--dtype', 'dtypes', type=click.Choice(list(DTYPES)), multiple=True, default=list(DTYPES))
@click.option('--condition', 'conditions', type=click.Choice(CONDITIONS), multiple=True, default=CONDITIONS)
@click.option('--repeats', type=click.IntRange(1), default=7, help='Of each action, after one that does not count.')
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='runs/benchmarks')
def main(
    models: tuple[str, ...], dtypes: tuple[str, ...], conditions: tuple[str, ...], repeats: int, out: Path
) -> None:
    """Measure updates and swaps, ours and others', and print a table for each model."""
    for model in models:
        for dtype in dtypes:
            results = {name: measure_under(name, model, dtype, repeats) for name in conditions}
            title = f'{model}, {dtype}, medians of {repeats}'
            save(out, f'update-{model}-{dtype}', f'{title}\n\n{table(results)}', {'title': title, 'rows': results})


if __name__ == '__main__':
    main()
