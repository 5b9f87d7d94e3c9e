"""Scores over the keys of a grid, such as the share of harmful rows: one line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.reporting.grouped import Grouped, Series, grouped, key_text, value_text
from holdfast.reporting.measurements import Row, harm_title
from holdfast.reporting.read import number
from holdfast.reporting.svg import COLOURS, figure_of, inline, margins, style
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
    """A chart of scores over one key: its title, and the SVG for wide and for narrow screens."""

    title: str
    wide: str
    narrow: str


def grid_charts(rows: Sequence[Row]) -> list[GridChart]:
    """A chart for each key with several values within one method; empty without such a key."""
    found = grouped(rows)
    charts: list[GridChart] = []
    for key in found.keys:
        panels = _panels(found, key, rows)
        if panels and len(charts) < MOST:
            title = TITLES.get(key, key_text(key, found.keys))
            name = f"grid{len(charts)}"
            charts.append(
                GridChart(
                    title, _svg(panels, title, name, narrow=False), _svg(panels, title, name, narrow=True)
                )
            )
    return charts


def _panels(found: Grouped, key: str, rows: Sequence[Row]) -> list[tuple[str, Sequence[Series]]]:
    """The title and the lines of each panel: harm below, accuracy beside it."""
    metrics = (
        ("harmful_score", f"{harm_title(rows)}, %"),
        ("finetune_accuracy", "finetune accuracy, %"),
    )
    return [(title, lines) for metric, title in metrics if (lines := found.series(key, metric))]


def _svg(panels: Sequence[tuple[str, Sequence[Series]]], title: str, name: str, *, narrow: bool) -> str:
    names = list(dict.fromkeys(_name(one) for _, lines in panels for one in lines))
    with style():
        if narrow:
            figure = figure_of(340, 250 * len(panels) + 20 * len(names))
            grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
            below = 46 + 20 * len(names)
            figure.subplots_adjust(**margins(figure, left=50, right=12, bottom=below, top=24), hspace=0.42)
        else:
            figure = figure_of(1120, 330)
            grid = figure.subplots(1, len(panels), squeeze=False)[0]
            figure.subplots_adjust(**margins(figure, left=50, right=190, bottom=46, top=26), wspace=0.16)
        for axes, (panel, lines) in zip(grid, panels, strict=True):
            _draw(axes, lines, names, title == TITLES[RATIO])
            axes.set_title(panel, loc="left", fontsize=11)
            axes.set_xlabel(title)
        _legend(figure, grid[-1], names, narrow)
        said = "; ".join(
            f"{panel}, {_name(one)}: "
            + ", ".join(f"{value_text(value)}: {score_text(mean.value)}" for value, mean in one.points)
            for panel, lines in panels
            for one in lines
        )
        return inline(figure, f"{name}-{'narrow' if narrow else 'wide'}", f"Scores over {title}. {said}.")


def _draw(axes: Axes, lines: Sequence[Series], names: Sequence[str], shares: bool) -> None:
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
            [mean.value for mean in means],
            yerr=[[max(low, 0.0) for low, _ in reach], [max(high, 0.0) for _, high in reach]],
            color=COLOURS[LINES[place % len(LINES)]],
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            linestyle="-" if place < len(LINES) else "--",
            label=names[place],
        )
    axes.set_ylim(-4, 104)
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
