# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The kernels that take all tensors in one launch: what they do, and what they are compiled to."""

import functools
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_bema.averaging.rules import Difference, Lerp
from composer_bema.averaging.windows import Window

pytest.importorskip('triton')

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BEMA_ROWS = (Lerp('ema', 'theta', 0.25), Difference('bema', 'ema', 0.5, 'theta', 'theta_0'))
BEMA_NAMES = ('theta', 'theta_0', 'ema', 'bema')


@pytest.mark.parametrize('interpret', ['1', pytest.param('0', marks=pytest.mark.gpu)], ids=['interpreter', 'GPU'])
def test_the_kernels_agree_with_those_that_go_chunk_by_chunk(interpret):
    """A process of its own passes `fused_on_device.py`."""
    result = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            Path(__file__).with_name('fused_on_device.py'),
            '-q',
            '-p',
            'no:cacheprovider',
        ],
        env={**os.environ, 'TRITON_INTERPRET': interpret},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]


class NoDevice:
    """What Triton asks of a driver to compile for a device that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', self.capability, 32)


@pytest.fixture(params=[80, 90])
def ptx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The machine code of what would be launched."""
    import triton

    from composer_bema.averaging import fused

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    # Newer ones look for a device when they are asked for the driver, be it to put it back.
    driver = triton.runtime.driver
    before = dict(vars(driver))
    driver.set_active(NoDevice(request.param))
    for kernel in (fused.step_kernel, fused.exchange_kernel, fused.nonfinite_kernel):
        monkeypatch.setattr(kernel, 'device_caches', defaultdict(kernel.create_binder))
    codes: list[str] = []

    def compile_only(kernel: Any, launch: Any, *arguments: Any, **constants: Any) -> None:
        run = functools.partial(kernel.warmup, launch.table, launch.tensor_of_block, *arguments, grid=(1,))
        binary = run(**constants, **launch.constants, num_warps=fused._NUM_WARPS)
        codes.append(binary.asm['ptx'])

    monkeypatch.setattr(fused, '_run', compile_only)
    yield codes
    vars(driver).update(before)


def unmasked(code: str, operation: str) -> Counter:
    """The widths of the loads or stores of whole blocks."""
    words = [line.split() for line in code.splitlines() if f'{operation}.global' in line]
    return Counter(word.split('global.')[1] for word, *_ in words if word.startswith(operation))


@pytest.mark.parametrize(('theta', 'width'), [(FP32, 'v4.b32'), (BF16, 'v2.b32')])
def test_whole_blocks_are_read_and_written_in_wide_words_and_once(ptx, theta, width):
    """A thread has eight elements of each operand: two words of each. What bema was before is not read."""
    from composer_bema.averaging import fused

    tensors = [torch.zeros(4096, dtype=dtype) for dtype in (theta, theta, FP32, FP32)]
    fused.apply_rows(BEMA_ROWS, BEMA_NAMES, [tensors])
    (code,) = ptx
    loads = unmasked(code, 'ld')
    assert loads[width] == (6 if theta == FP32 else 4)
    assert loads['v4.b32'] == (6 if theta == FP32 else 2)
    assert unmasked(code, 'st') == {'v4.b32': 4}
    assert 'shared' not in code


def test_what_is_not_aligned_is_not_read_in_wide_words(ptx):
    from composer_bema.averaging import fused

    fused.exchange([(torch.zeros(4097)[1:], torch.zeros(4096))])
    assert not any(width.startswith('v') for width in (unmasked(ptx[0], 'ld') | unmasked(ptx[0], 'st')))


def test_double_precision_is_compiled_as_such(ptx):
    from composer_bema.averaging import fused

    tensors = [torch.zeros(4096, dtype=FP64) for _ in range(4)]
    fused.apply_rows(BEMA_ROWS, BEMA_NAMES, [tensors])
    fused.first_nonfinite(tensors[:1])
    step, guard = ptx
    assert 'fma.rn.f64' in step
    assert '.f32' not in step
    assert '.f32' not in guard


def test_a_schedule_needs_no_kernel_of_its_own_for_every_weight(ptx):
    """Nor do the rotating slots of a window."""
    from composer_bema.averaging import fused

    tensors = [torch.zeros(4096) for _ in range(4)]
    for weight in (0.0, 0.1, 1e-300, 0.4):
        fused.apply_rows([Lerp('ema', 'theta', weight)], BEMA_NAMES, [tensors])
    window = Window(2)
    for update in (2, 3, 4):
        fused.apply_rows(window.linear_step(update, 1, update).rows, ['theta', *window.buffers], [tensors])
    assert len(set(ptx)) == 2
