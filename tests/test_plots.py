# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures."""

import math
import re
import sys
from xml.etree import ElementTree

import pytest

from composer_bema.plots import (
    STROKES,
    Panel,
    check_folder,
    draw_curves,
    plot_curves,
    plot_curves_with_errors,
    plot_heat_map,
    plot_log_panels,
    plot_panels,
)


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


def test_flops_as_x_are_a_number_and_a_power_of_ten(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('composer_bema.plots._write', lambda figure, path, dpi=150: drawn.append(figure))
    plot_curves(
        {'bema': [(step * 3.7e17, 4 - step) for step in range(4)]}, tmp_path / 'x.png', 'training FLOPs', 'loss'
    )
    drawn[0].draw_without_rendering()
    axis = drawn[0].axes[0].xaxis
    assert axis.get_offset_text().get_text() == '1e18'
    assert all(len(label.get_text()) <= 5 for label in axis.get_ticklabels())


def test_many_curves_have_a_small_legend(tmp_path):
    curves = {f'bema ema_power={n / 100} bias_power=0.4': [(1, n), (2, -n)] for n in range(40)}
    plot_curves(curves, tmp_path / 'curves.png', 'step', 'loss')
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_curves_have_their_errors_as_bars(tmp_path, monkeypatch):
    """Each bar reaches as far down as up, and an error that is not a number has none."""
    drawn = []
    monkeypatch.setattr('composer_bema.plots._write', lambda figure, path, dpi=150: drawn.append(figure))
    curves = {'ema': [(0, 2.0, math.nan), (25, 1.5, 0.25)], 'bema': [(25, 1.25, 0.5)]}
    plot_curves_with_errors(curves, tmp_path / 'x.png', 'step', 'loss')
    axes = drawn[0].axes[0]
    ema, bema = ([segment.tolist() for segment in bars.get_segments()] for bars in axes.collections)
    assert ema[-1] == [[25, 1.25], [25, 1.75]] and all(math.isnan(end) for _, end in ema[0])
    assert bema == [[[25, 0.75], [25, 1.75]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['ema', 'bema']


def test_curves_with_errors_become_a_png(tmp_path):
    path = tmp_path / 'curves.png'
    plot_curves_with_errors({'bema': [(0, 2.0, 0.1), (5, 1.5, 0.2)]}, path, 'step', 'loss')
    assert path.read_bytes().startswith(b'\x89PNG')
    assert list(tmp_path.iterdir()) == [path]


def test_panels_stand_in_rows_over_one_axis(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('composer_bema.plots._write', lambda figure, path, dpi=150: drawn.append(figure))
    points = {'bema': [(0, 2.0, 0.1), (200, 1.5, 0.1)]}
    upper = [Panel(points, 'loss', 'noisy'), Panel(points, 'loss', 'quiet')]
    lower = [Panel({'ema - bema': [(100, 0.5, 0.1)]}, 'difference', level=0), Panel(points, 'difference')]
    plot_panels([upper, lower], tmp_path / 'x.png', 'step')
    axes = drawn[0].axes
    assert [each.get_title() for each in axes] == ['noisy', 'quiet', '', '']
    assert [each.get_xlabel() for each in axes] == ['', '', 'step', 'step']
    assert all(each.get_xlim() == axes[0].get_xlim() for each in axes)
    (level,) = [line for line in axes[2].lines if line.get_linestyle() == '--']
    assert set(level.get_ydata()) == {0}


@pytest.mark.parametrize(
    'cells',
    [
        {(0.2, 0.1): 2.0, (0.2, 0.4): 1.5, (0.5, 0.4): 1.75},
        {(1, 1): 3.0},
        {(0, 1): 2.0, (1, 1): 2.0, (2, 1): float('nan')},
    ],
    ids=['missing cells', 'a single value', 'one row'],
)
def test_cells_become_a_heat_map(tmp_path, cells):
    path = tmp_path / 'map.png'
    plot_heat_map(cells, path, 'ema_power', 'bias_power', 'loss')
    assert path.read_bytes().startswith(b'\x89PNG')
    assert list(tmp_path.iterdir()) == [path]


def test_a_heat_map_has_its_numbers_in_their_cells(tmp_path, monkeypatch):
    """The columns are x and the rows y, upward, and the lowest value is bold."""
    drawn = []
    monkeypatch.setattr('composer_bema.plots._write', lambda figure, path, dpi=150: drawn.append(figure))
    plot_heat_map({(0.5, 2): 1.5, (0.25, 2): 2.0, (0.5, 1): 3.0}, tmp_path / 'map.png', 'x', 'y', 'loss')
    axes = drawn[0].axes[0]
    texts = {text.get_position(): (text.get_text(), text.get_fontweight()) for text in axes.texts}
    assert texts == {(1, 1): ('1.5000', 'bold'), (0, 1): ('2.0000', 'normal'), (1, 0): ('3.0000', 'normal')}
    assert [label.get_text() for label in axes.get_xticklabels()] == ['0.25', '0.5']
    assert [label.get_text() for label in axes.get_yticklabels()] == ['1', '2']
    assert axes.images[0].origin == 'lower'


def test_panels_share_one_legend_in_the_order_of_the_styles(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('composer_bema.plots._write', lambda figure, path, **kwargs: drawn.append(figure))
    panels = {
        ('little noise', 'flat'): {'ema': [(1, 10.0), (10, 1.0)], 'bema': [(1, 1.0)]},
        ('little noise', 'steep'): {'bema': [(1, 0.1), (10, 0.01)]},
        ('much noise', 'steep'): {'bema': [(1, 100.0), (float('nan'), float('nan')), (10, 200.0)]},
    }
    styles = {'bema': {'color': 'red'}, 'ema': {'color': 'blue', 'linestyle': '--'}, 'absent': {}}
    plot_log_panels(panels, tmp_path / 'panels.png', 'step', 'error', styles)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ['bema', 'ema']
    flat, steep, nothing, noisy = drawn[0].axes
    assert [flat.get_title(), steep.get_title(), noisy.get_title()] == ['flat', 'steep', '']
    assert [flat.get_ylabel(), nothing.get_ylabel(), noisy.get_xlabel()] == ['little noise', 'much noise', 'step']
    assert [(line.get_label(), line.get_color()) for line in flat.get_lines()] == [('bema', 'red'), ('ema', 'blue')]
    assert (noisy.get_xscale(), noisy.get_yscale()) == ('log', 'log')
    assert not nothing.get_lines()
    assert flat.get_ylim() == steep.get_ylim() != noisy.get_ylim()


def test_panels_become_a_png(tmp_path):
    plot_log_panels({('a', 'b'): {'ema': [(1, 2.0)]}}, tmp_path / 'panels.png', 'x', 'y', {'ema': {}})
    assert (tmp_path / 'panels.png').read_bytes().startswith(b'\x89PNG')


def test_a_folder_that_is_missing_is_named(tmp_path):
    (tmp_path / 'file').touch()
    for name in ('none', 'file'):
        path = tmp_path / name / 'x.png'
        message = f"^There is no folder '{tmp_path / name}' for the picture '{path}': make it, or name another.$"
        for draw in (check_folder, lambda path: plot_curves({'a': [(1, 2)]}, path, 'x', 'y')):
            with pytest.raises(FileNotFoundError, match=message):
                draw(path)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_ticks_are_whole_numbers_where_there_are_several(tmp_path, monkeypatch):
    """Of steps they are, and of a power between 0 and 1 they cannot be."""
    drawn = []
    monkeypatch.setattr('composer_bema.plots._write', lambda figure, path, dpi=150: drawn.append(figure))
    for last in (6, 0.6):
        plot_curves({'a': [(last / 3, 1), (last, 2)]}, tmp_path / 'x.png', 'x', 'y')
    steps, powers = (figure.axes[0].get_xticks() for figure in drawn)
    assert len(steps) > 2 and all(tick == round(tick) for tick in steps)
    assert sum(0.2 <= tick <= 0.6 for tick in powers) > 2


def test_an_element_for_a_page_has_ids_of_its_own_and_the_colour_of_the_text():
    curves = {'a & b': [(0, 1.0), (2, float('nan')), (3, 2.0)], '_$x': [(0, 1.5)]}
    one, other = (draw_curves(curves, 'step', 'loss', prefix) for prefix in ('one', 'other'))
    ids = [set(re.findall(r'\bid="([^"]*)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', one)) <= ids[0]
    root = ElementTree.fromstring(one.replace('xlink:href', 'href'))
    assert root.attrib.keys() == {'class', 'viewBox'}
    assert {'step', 'loss'} < {element.text for element in root.iter('text')}
    assert 'currentColor' in one and '#000000' not in one and 'font-family' not in one
    assert [colour in one for colour, _ in STROKES[:3]] == [True, True, False]


def test_more_curves_than_strokes_take_them_in_turn():
    curves = {str(n): [(0, n), (1, n)] for n in range(len(STROKES) + 1)}
    text = draw_curves(curves, 'x', 'y', 'p')
    counts = [len(re.findall(f'stroke: {colour}; stroke-width: 1.5', text)) for colour, _ in STROKES]
    assert counts == [2, *[1] * (len(STROKES) - 1)]
