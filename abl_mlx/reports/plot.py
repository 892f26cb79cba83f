"""`abl-mlx measure --plot`: the charts of a measurement as a PNG or SVG file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abl_mlx.records.edits import MeasureRecord
from abl_mlx.reports import charts, figures
from abl_mlx.reports.charts import Chart
from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError
from convert.base.suffixes import ends_in


def check(path: Path) -> None:
    """Check, before any long work, that the picture can be written.

    Raises:
        UserError: a file that exists, is neither .png nor .svg, or needs what is not installed.
    """
    if not ends_in(path, ".png", ".svg"):
        raise UserError(f"{path}: a plot ends in .png or .svg.")
    if ends_in(path, ".png") and importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"{path}: a .png needs matplotlib: pip install 'abl-mlx[plot]', or write "
            f"{path.with_suffix('.svg').name}, which needs nothing."
        )
    check_new(path)


def draw(path: Path, record: MeasureRecord) -> None:
    """Draw the layers' charts and the two clouds of a measurement's record.

    Raises:
        UserError: when it has nothing to draw.
    """
    found = figures.measure_charts(record)
    if not found:
        raise UserError(
            f"{path}: nothing was measured by layer, so there is nothing to plot; leave --plot out."
        )
    title = f"{record.source}: refusal by layer"
    with new_file(path) as staged:
        if ends_in(path, ".svg"):
            staged.write_text(charts.sheet(found, title), encoding="utf-8")
        else:
            _png(staged, found, title)


# Those of charts.MARKS, in their order.
_MARKERS = ("o", "s", "^", "D", "P", "x")


def _png(path: Path, found: Sequence[Chart], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(found) // 2)
    figure = Figure(figsize=(11, 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title))
    for index, chart in enumerate(found):
        _axes(figure.add_subplot(rows, 2, index + 1), chart)
    figure.savefig(path, format="png", dpi=150)


def _axes(axes: Any, chart: Chart) -> None:
    """Draw one chart with the same scales as its SVG."""
    across, up = charts.scales(chart)
    for index, one in enumerate(chart.series):
        axes.plot(
            [x for x, _ in one.points],
            [y for _, y in one.points],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linestyle="-" if one.joined else "none",
            alpha=0.4 if one.faint else 0.9,
            label=_plain(one.name) or "_",
        )
    if chart.log:
        axes.set_yscale("log")
    axes.set(title=_plain(chart.title), xlabel=chart.x, ylabel=chart.y)
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    axes.set_xticks(across.ticks, [charts.tick_text(chart, tick) for tick in across.ticks])
    if chart.marker is not None:
        axes.axvline(chart.marker[0], linestyle="--", linewidth=1, color="0.5")
    if any(one.name for one in chart.series):
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _plain(text: str) -> str:
    """Text with escaped dollar signs, which matplotlib would take for formulas."""
    return text.replace("$", r"\$")
