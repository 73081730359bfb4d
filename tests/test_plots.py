# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures."""

import sys

import pytest

from composer_bema.plots import plot_curves


@pytest.mark.parametrize('curves', [{'ema': [(1, 2.0), (2, 1.5)], 'bema': [(1, 1.9)]}, {'one': []}])
def test_curves_become_a_png(tmp_path, curves):
    path = tmp_path / 'curves.png'
    path.write_text('an older picture')
    plot_curves(curves, path, 'step', 'loss')
    assert path.read_bytes().startswith(b'\x89PNG')
    assert list(tmp_path.iterdir()) == [path]


def test_no_window_system_is_touched(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'matplotlib.pyplot', raising=False)
    plot_curves({'a': [(0, 1.0)]}, tmp_path / 'curves.png', 'x', 'y')
    assert 'matplotlib.pyplot' not in sys.modules
