# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a run."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'STROKES',
    'Panel',
    'check_folder',
    'draw_curves',
    'plot_curves',
    'plot_curves_with_errors',
    'plot_heat_map',
    'plot_log_panels',
    'plot_panels',
]

Curve = Sequence[tuple[float, float]]
CurveWithErrors = Sequence[tuple[float, float, float]]

_FEW_CURVES = 8
# More points than these would run into each other as markers.
_FEW_POINTS = 60

# The colour and the dashes (SVG's stroke-dasharray) of the curves of `draw_curves`, in turn. The colours can be told
# from a white and from a black page, and the dashes without any colour.
STROKES = (
    ('#3b82c4', ''),
    ('#d9622b', '6 2'),
    ('#2e9d6b', '2 2'),
    ('#a860c9', '7 2 2 2'),
    ('#c2457a', '4 3'),
    ('#8a7a1f', '9 3'),
)


def plot_curves(curves: Mapping[str, Curve], path: str | Path, x_label: str, y_label: str) -> None:
    """Draw one line for each named curve and write a PNG.

    Args:
        curves: Points (x, y) by name; the legend keeps their order.
        path: The PNG file, in a folder that is there; replaced when it is there itself.
        x_label: What x is; its ticks are whole numbers where it spans several.
        y_label: What y measures.
    """
    figure, axes = _figure_of_curves(x_label, y_label)
    for name, points in curves.items():
        # A single evaluation is a point, which a line without markers would not show.
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, marker='o', markersize=3)
    _add_legend(axes, len(curves))
    _write(figure, path)


def plot_curves_with_errors(
    curves: Mapping[str, CurveWithErrors], path: str | Path, x_label: str, y_label: str
) -> None:
    """Draw one line with error bars for each named curve and write a PNG.

    Args:
        curves: Points (x, y, error) by name, the bars reaching from y - error to y + error; an error that is not a
            number has no bar. The legend keeps their order.
        path: The PNG file, in a folder that is there; replaced when it is there itself.
        x_label: What x is; its ticks are whole numbers where it spans several.
        y_label: What y measures, and what the bars show.
    """
    plot_panels([[Panel(curves, y_label)]], path, x_label)


def draw_curves(curves: Mapping[str, Curve], x_label: str, y_label: str, prefix: str) -> str:
    """Draw one line for each named curve, as an SVG element for an HTML page.

    Text and axes have the colour of the text around them, the background is clear. The names are not drawn, for a page
    has better means: the curves have the `STROKES` in turn.

    Args:
        curves: Points (x, y) by name; those that are not finite are gaps.
        x_label: What x is; its ticks are whole numbers where it spans several.
        y_label: What y measures.
        prefix: What the ids in the element begin with; another for each picture of a page.

    Returns:
        str: The element, with the class ``picture``, as wide as what it is put into.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # Text stays text, and equal pictures are equal files.
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': prefix, 'font.size': 9.5}):
        figure, axes = _figure_of_curves(x_label, y_label)
        figure.set_size_inches(5, 3)
        for points, (colour, dashes) in zip(curves.values(), itertools.cycle(STROKES), strict=False):
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                linestyle=(0, [float(length) for length in dashes.split()]) if dashes else '-',
                marker='o' if len(points) <= _FEW_POINTS else '',
                markersize=3,
            )
        axes.patch.set_visible(False)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_figure(text, format='svg', facecolor='none')
    return _as_element(text.getvalue(), prefix)


def _as_element(document: str, prefix: str) -> str:
    """Make a document of matplotlib's part of a page: without its head, sizes and style, and with ids of its own."""
    body = document[document.index('<svg') :].replace('#000000', 'currentColor')
    for clutter in (r'<metadata>.*?</metadata>', r'<style[^>]*>.*?</style>', r'font-family: [^;"]*;? ?'):
        body = re.sub(clutter, '', body, flags=re.DOTALL)
    body = re.sub(r'\bid="|href="#|url\(#', lambda match: f'{match[0]}{prefix}-', body)
    view = re.search(r'viewBox="[^"]*"', body)
    assert view is not None, 'matplotlib writes one'
    return re.sub(r'<svg[^>]*>', f'<svg class="picture" {view[0]}>', body, count=1).strip()


class Panel(NamedTuple):
    """One of several pictures on a page: curves with error bars, as `plot_curves_with_errors` draws them."""

    curves: Mapping[str, CurveWithErrors]
    y_label: str
    title: str = ''
    level: float | None = None
    """Where a dashed line runs across."""


def plot_panels(rows: Sequence[Sequence[Panel]], path: str | Path, x_label: str) -> None:
    """Draw panels in rows, with one axis of x for all, and write a PNG.

    Args:
        rows: The panels, as many in each row.
        path: The PNG file, in a folder that is there; replaced when it is there itself.
        x_label: What x is; its ticks are whole numbers where it spans several.
    """
    columns = len(rows[0])
    # Panels beside each other are smaller than a picture of its own.
    scale = 1 if columns == 1 else 0.6
    figure = _figure(7 * scale * columns, 4.5 * scale * len(rows))
    grid = figure.subplots(len(rows), len(rows[0]), sharex=True, squeeze=False)
    for panel, axes in zip(itertools.chain(*rows), grid.flat, strict=True):
        for name, points in panel.curves.items():
            x, y, errors = ([point[part] for point in points] for part in range(3))
            axes.errorbar(x, y, yerr=errors, label=name, marker='o', markersize=3, capsize=2, elinewidth=1)
        if panel.level is not None:
            axes.axhline(panel.level, color='black', linestyle='--', linewidth=1)
        axes.set_title(panel.title)
        _label(axes, '', panel.y_label)
        axes.legend(fontsize='small')
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    # A page of panels at 150 dots an inch would be half a megabyte.
    _write(figure, path, dpi=150 if grid.size == 1 else 80)


def plot_heat_map(
    cells: Mapping[tuple[float, float], float], path: str | Path, x_label: str, y_label: str, value_label: str
) -> None:
    """Draw values over two settings as coloured cells with their numbers, and write a PNG.

    Args:
        cells: Values by (x, y); those that are missing stay blank.
        path: The PNG file, in a folder that is there; replaced when it is there itself.
        x_label: What x is.
        y_label: What y is.
        value_label: What the values are.
    """
    columns, rows = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    figure = _figure()
    axes = figure.add_subplot()
    grid = [[cells.get((x, y), float('nan')) for x in columns] for y in rows]
    image = axes.imshow(grid, origin='lower', aspect='auto', cmap='viridis_r')
    figure.colorbar(image, label=value_label)
    axes.set_xticks(range(len(columns)), [f'{x:g}' for x in columns])
    axes.set_yticks(range(len(rows)), [f'{y:g}' for y in rows])
    best = min(cells, key=lambda key: cells[key])
    for (x, y), value in cells.items():
        weight = 'bold' if (x, y) == best else 'normal'
        axes.text(
            columns.index(x),
            rows.index(y),
            f'{value:.4f}',
            ha='center',
            va='center',
            fontweight=weight,
            bbox={'facecolor': 'white', 'alpha': 0.7, 'edgecolor': 'none', 'pad': 1.5},
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _write(figure, path)


def plot_log_panels(
    panels: Mapping[tuple[str, str], Mapping[str, Curve]],
    path: str | Path,
    x_label: str,
    y_label: str,
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draw a grid of panels with logarithmic axes and one legend below them, and write a PNG.

    Args:
        panels: Points (x, y) by name, by the titles of the panel's row and column; a NaN breaks a line.
        path: The PNG file, in a folder that is there; replaced when it is there itself.
        x_label: What x is.
        y_label: What y measures; each row of panels has limits of its own.
        styles: How matplotlib draws each name, the same in all panels; the legend keeps this order.
    """
    rows, columns = (list(dict.fromkeys(key[axis] for key in panels)) for axis in (0, 1))
    figure = _figure(2.8 * len(columns), 2.3 * len(rows) + 1)
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey='row', squeeze=False)
    for (row, column), curves in panels.items():
        axes = grid[rows.index(row)][columns.index(column)]
        for name in (name for name in styles if name in curves):
            axes.loglog([x for x, _ in curves[name]], [y for _, y in curves[name]], label=name, **styles[name])
        axes.grid(alpha=0.3)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize='medium')
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(row)
    figure.supylabel(y_label, fontsize='medium')
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    names = [name for name in styles if name in handles]
    figure.legend([handles[name] for name in names], names, loc='outside lower center', ncols=4, fontsize='small')
    _write(figure, path, dpi=100)


def check_folder(path: str | Path) -> None:
    """Check that there is a folder for a picture.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}' for the picture '{path}': make it, or name another.")


def _figure(width: float = 7, height: float = 4.5) -> 'Figure':
    # Drawn without pyplot: no window system is touched, and no figure of the caller's is disturbed.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def _figure_of_curves(x_label: str, y_label: str) -> 'tuple[Figure, Axes]':
    figure = _figure()
    axes = figure.add_subplot()
    _label(axes, x_label, y_label)
    return figure, axes


def _label(axes: 'Axes', x_label: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def _add_legend(axes: 'Axes', curves: int) -> None:
    # What many settings are called would cover the curves.
    axes.legend(fontsize='medium' if curves <= _FEW_CURVES else 'xx-small')


def _write(figure: 'Figure', path: str | Path, dpi: int = 150) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_folder(path)
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}')
    FigureCanvasAgg(figure).print_figure(unfinished, dpi=dpi, format='png')
    unfinished.replace(path)
