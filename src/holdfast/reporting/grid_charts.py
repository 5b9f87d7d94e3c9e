"""Any metric over the keys of a grid, such as the share of harmful rows: one line for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.errors import InputError
from holdfast.reporting.collect import ReportData
from holdfast.reporting.grouped import Grouped, Mean, Series, grouped, key_text, value_text
from holdfast.reporting.metrics import Metric, measured, named
from holdfast.reporting.read import number
from holdfast.reporting.svg import COLOURS, figure_of, inline, margins, style
from holdfast.reporting.table import task_key
from holdfast.reporting.text import one_line, score_text, share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = tuple(f"line{number}" for number in range(1, 7))
MARKERS = "os^Dv<>P"
MOST = 4
"""The number of keys with a chart; the first keys of the recipe are drawn."""
RATIO = "data.poison_ratio"
TITLES = {RATIO: "share of harmful rows"}
TICKS = 6
"""With up to this many values, each has a tick."""


@dataclass(frozen=True)
class GridChart:
    """A chart of metrics over one key: its title, and the SVG for wide and for narrow screens."""

    title: str
    wide: str
    narrow: str


def grid_charts(data: ReportData, names: Sequence[str] = ()) -> list[GridChart]:
    """A chart for each key with several values within one method; empty without such a key.

    Args:
        data: the report.
        names: the metrics to draw; by default the harmful score and the score on the task.

    Raises:
        InputError: the rows do not have a named metric, or it cannot be drawn over a key.
    """
    asked = named(data.rows, names)
    known = measured(data.rows)
    metrics = asked or [known[key] for key in ("harmful_score", task_key(data.rows)) if key in known]
    found = grouped([] if data.differences else data.rows)
    drawn = [(key, panels) for key in found.keys if (panels := _panels(found, key, metrics))]
    told = {metric.key for _, panels in drawn for metric, _ in panels}
    if absent := [metric.key for metric in asked if metric.key not in told]:
        raise InputError(_not_drawn(absent, data, found.keys))
    charts: list[GridChart] = []
    for key, panels in drawn[:MOST]:
        title, name = TITLES.get(key, key_text(key, found.keys)), f"grid{len(charts)}"
        wide, narrow = (_svg(panels, title, name, narrow=narrow) for narrow in (False, True))
        charts.append(GridChart(title, wide, narrow))
    return charts


def _not_drawn(absent: Sequence[str], data: ReportData, keys: Sequence[str]) -> str:
    """Why metrics cannot be drawn over the grid, and what to do."""
    told = f"{', '.join(absent)} cannot be drawn over a grid key: "
    if data.differences:
        return told + "the runs were measured under different protocols. Leave out --metric, or --force."
    if not keys:
        told += "no key of the recipe has several values within one method. "
        return (
            told + "Give all runs of a sweep, or leave out --metric; --csv writes the numbers of each method."
        )
    return f"{told}no method has it at two values of {' or '.join(keys)}."


def _panels(found: Grouped, key: str, metrics: Sequence[Metric]) -> list[tuple[Metric, Sequence[Series]]]:
    """The metric and the lines of each panel."""
    return [(metric, lines) for metric in metrics if (lines := found.series(key, metric.key))]


def _svg(panels: Sequence[tuple[Metric, Sequence[Series]]], title: str, name: str, *, narrow: bool) -> str:
    names = list(dict.fromkeys(_name(one) for _, lines in panels for one in lines))
    with style():
        figure, grid = _axes(len(panels), len(names), narrow)
        for axes, (metric, lines) in zip(grid, panels, strict=True):
            _draw(axes, lines, names, metric, title == TITLES[RATIO])
            axes.set_title(one_line(metric.heading, 46 if narrow else 60), loc="left", fontsize=11)
            axes.set_xlabel(title)
        _legend(figure, grid[0], names, narrow)
        said = "; ".join(
            f"{metric.heading}, {_name(one)}: "
            + ", ".join(f"{value_text(value)}: {_number(mean, metric)}" for value, mean in one.points)
            for metric, lines in panels
            for one in lines
        )
        return inline(figure, f"{name}-{'narrow' if narrow else 'wide'}", f"Scores over {title}. {said}.")


def _axes(panels: int, lines: int, narrow: bool) -> tuple[Figure, list[Axes]]:
    """A figure with one panel below the other for phones, else two beside each other, and room for names."""
    across = 1 if narrow else min(panels, 2)
    down = math.ceil(panels / across)
    if narrow:
        below = 46 + 20 * lines
        figure = figure_of(340, 230 * down + below)
        edges = margins(figure, left=50, right=12, bottom=below, top=24)
    else:
        figure = figure_of(1120, 310 * down + 20)
        edges = margins(figure, left=50, right=190, bottom=46, top=26)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    figure.subplots_adjust(**edges, wspace=0.16, hspace=0.42 if narrow else 0.32)
    for empty in grid[panels:]:
        empty.set_axis_off()
    return figure, grid[:panels]


def _number(mean: Mean, metric: Metric) -> str:
    return score_text(mean.value) if metric.unit == "%" else f"{mean.value * metric.factor:.4g}"


def _draw(axes: Axes, lines: Sequence[Series], names: Sequence[str], metric: Metric, shares: bool) -> None:
    values = list(dict.fromkeys(value for one in lines for value, _ in one.points))
    numeric = all(number(value) is not None for value in values)
    for one in lines:
        place = names.index(_name(one))
        across = [value if numeric else values.index(value) for value, _ in one.points]
        means = [mean for _, mean in one.points]
        reach = [
            (mean.value - mean.interval[0], mean.interval[1] - mean.value) if mean.interval else (0.0, 0.0)
            for mean in means
        ]
        axes.errorbar(
            across,
            [mean.value * metric.factor for mean in means],
            yerr=[[max(part, 0.0) * metric.factor for part in parts] for parts in zip(*reach, strict=True)],
            color=COLOURS[LINES[place % len(LINES)]],
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            linestyle="-" if place < len(LINES) else "--",
            label=names[place],
        )
    if metric.unit == "%":
        axes.set_ylim(-4, 104)
    elif all(mean.value >= 0 for one in lines for _, mean in one.points):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.06)  # room above a line that is almost flat
    if not numeric:
        axes.set_xticks(range(len(values)), [one_line(value_text(value), 14) for value in values])
    elif len(values) <= TICKS:
        texts = [share_text(value) if shares else value_text(value) for value in values]
        axes.set_xticks(values, texts)


def _legend(figure: Figure, axes: Axes, names: Sequence[str], narrow: bool) -> None:
    """The names of the lines: at the right, in the order of their last values, or below."""
    handles, labels = axes.get_legend_handles_labels()
    shown = sorted(zip(handles, labels, strict=True), key=lambda pair: names.index(pair[1]))
    place = {"loc": "lower left", "bbox_to_anchor": (0.02, 0.0)} if narrow else {"loc": "center right"}
    figure.legend(
        [handle for handle, _ in shown], [one_line(label, 44) for _, label in shown], fontsize=10, **place
    )


def _name(one: Series) -> str:
    fixed = ", ".join(f"{key_text(key, one.fixed)} {value_text(value)}" for key, value in one.fixed.items())
    return f"{one.method}, {fixed}" if fixed else one.method
