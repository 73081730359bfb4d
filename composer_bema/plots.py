# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ['plot_curves']

Curve = Sequence[tuple[float, float]]


def plot_curves(curves: Mapping[str, Curve], path: str | Path, x_label: str, y_label: str) -> None:
    """Draw one line for each named curve and write a PNG.

    Args:
        curves: Points (x, y) by name; the legend keeps their order.
        path: The PNG file, replaced when it is there.
        x_label: What x counts, in whole numbers.
        y_label: What y measures.
    """
    # Drawn without pyplot: no window system is touched, and no figure of the caller's is disturbed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        # A single evaluation is a point, which a line without markers would not show.
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, marker='o', markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}')
    canvas.print_figure(unfinished, dpi=150, format='png')
    unfinished.replace(path)
