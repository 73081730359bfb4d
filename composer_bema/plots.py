# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a run."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Panel', 'check_folder', 'plot_curves', 'plot_curves_with_errors', 'plot_heat_map', 'plot_panels']

Curve = Sequence[tuple[float, float]]
CurveWithErrors = Sequence[tuple[float, float, float]]

_FEW_CURVES = 8


def plot_curves(curves: Mapping[str, Curve], path: str | Path, x_label: str, y_label: str) -> None:
    """Draw one line for each named curve and write a PNG.

    Args:
        curves: Points (x, y) by name; the legend keeps their order.
        path: The PNG file, in a folder that is there; replaced when it is there itself.
        x_label: What x is; its ticks are whole numbers where it spans several.
        y_label: What y measures.
    """
    figure = _figure()
    axes = figure.add_subplot()
    for name, points in curves.items():
        # A single evaluation is a point, which a line without markers would not show.
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, marker='o', markersize=3)
    _label(axes, x_label, y_label)
    # What many settings are called would cover the curves.
    axes.legend(fontsize='medium' if len(curves) <= _FEW_CURVES else 'xx-small')
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
    figure = _figure(columns=len(rows[0]), rows=len(rows))
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
    figure.set_dpi(150 if grid.size == 1 else 80)
    _write(figure, path)


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


def check_folder(path: str | Path) -> None:
    """Check that there is a folder for a picture.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}' for the picture '{path}': make it, or name another.")


def _figure(columns: int = 1, rows: int = 1) -> 'Figure':
    # Drawn without pyplot: no window system is touched, and no figure of the caller's is disturbed.
    from matplotlib.figure import Figure

    # Panels beside each other are smaller than a picture of its own.
    scale = 1 if columns == 1 else 0.6
    return Figure(figsize=(7 * scale * columns, 4.5 * scale * rows), layout='constrained', dpi=150)


def _label(axes: 'Axes', x_label: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def _write(figure: 'Figure', path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_folder(path)
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}')
    FigureCanvasAgg(figure).print_figure(unfinished, dpi=figure.dpi, format='png')
    unfinished.replace(path)
