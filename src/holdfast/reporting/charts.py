"""The scatter plot of a report, as inline SVG that follows the page's theme, or as a PNG for a README."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import OutputError
from holdfast.machine.files import beside
from holdfast.reporting.collect import ReportData
from holdfast.reporting.labels import Box, place
from holdfast.reporting.measurements import Row, Score, harm_title, sweeps
from holdfast.reporting.svg import COLOURS, figure_of, inline, margins, style
from holdfast.reporting.table import task_title
from holdfast.reporting.text import NOT_MEASURED, one_line, score_text, small

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"reference": "D", "undefended": "s", "defended": "o", "control": "o"}
HOLLOW = ("reference", "control")
ROLE_NAMES = {
    "reference": "before fine-tuning",
    "undefended": "fine-tuned, no defense",
    "defended": "fine-tuned, with a defense",
    "control": "control",
}
SIZE = 10
"""The font size of labels."""
NAMED = 24
"""With up to this many points, each is labelled with its name; with more, with its number only."""
NEAR = 11.0
"""Points at most this many pixels apart share one label."""


def plotted(rows: Sequence[Row]) -> list[Row]:
    """The rows that have both a harmful score and a finetune accuracy."""
    return [row for row in rows if row.scores["harmful_score"] and row.scores["finetune_accuracy"]]


def scores_svg(data: ReportData, *, narrow: bool = False) -> str | None:
    """Plot finetune accuracy against harmful score, with error bars; return None if no row has both.

    `narrow` gives a small plot for phones, with points labelled by number only.
    """
    rows = plotted(data.rows)
    if not rows:
        return None
    with style():
        figure = figure_of(340, 360) if narrow else figure_of(760, 450)
        axes = figure.add_subplot()
        figure.subplots_adjust(**margins(figure, left=58, right=14, bottom=46, top=30))
        numbers_only = narrow or len(rows) > NAMED
        _scatter(figure, axes, rows, numbers_only=numbers_only, short_legend=narrow)
        points = "; ".join(f"{row.number} {row.label}: {_point_text(row)}" for row in rows)
        name = "scores-narrow" if narrow else "scores"
        title = harm_title(rows)
        said = f"{title.capitalize()} against {small(task_title(rows))}. {points}."
        return inline(figure, name, said)


def save_png(data: ReportData, path: Path) -> Path:
    """Save the plot with a short table beside it as a PNG in the light theme (for a README).

    Raises:
        OutputError: the file cannot be written.
    """
    rows = plotted(data.rows)
    with style():
        height = max(430, 60 + 24 * len(data.rows))
        figure = figure_of(1180, height)
        figure.patch.set_facecolor("white")
        axes = figure.add_axes((58 / 1180, 46 / height, 620 / 1180, (height - 76) / height))
        axes.set_facecolor("white")
        if rows:
            _scatter(figure, axes, rows, numbers_only=len(rows) > NAMED, short_legend=False)
        _side_table(figure, data.rows)
        try:
            with beside(path) as temporary:
                figure.savefig(temporary, format="png", dpi=144, facecolor="white")
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path


def _scatter(
    figure: Figure, axes: Axes, rows: Sequence[Row], *, numbers_only: bool, short_legend: bool
) -> None:
    for role, marker in MARKERS.items():
        colour = COLOURS["defended" if role == "control" else role]
        points = [_point(row) for row in rows if row.role == role]
        if not points:
            continue
        for harmful, accuracy in points:
            axes.errorbar(
                harmful.value,
                accuracy.value,
                xerr=harmful.stderr,
                yerr=accuracy.stderr,
                fmt="none",
                color=colour,
                ecolor=colour,
                elinewidth=1.2,
                capsize=2.5,
            )
        axes.plot(
            [harmful.value for harmful, _ in points],
            [accuracy.value for _, accuracy in points],
            linestyle="none",
            marker=marker,
            markersize=7.5,
            markerfacecolor="none" if role in HOLLOW else colour,
            markeredgecolor=colour,
            markeredgewidth=1.6,
            label=ROLE_NAMES[role].partition(",")[0] + (", defended" if role == "defended" else "")
            if short_legend
            else ROLE_NAMES[role],
            clip_on=False,
            zorder=3.5 if role in HOLLOW else 3,  # hollow markers go on top: those below stay visible
        )
    _join_sweeps(axes, rows)
    axes.set_xlim(-4, 104)
    low, high = _accuracy_limits(rows)
    limits = (low, high + (high - low) * 0.09)  # room for the mark of the corner above the points
    axes.set_ylim(*limits)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    axes.set_ylim(*limits)
    axes.set_xlabel(f"{harm_title(rows)}, %  (lower is better)")
    axes.set_ylabel(f"{small(task_title(rows))}, %  (higher is better)")
    _mark_corner(axes, short_legend)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=4,
        borderaxespad=0,
        fontsize=8.5 if short_legend else 10,
        handletextpad=0.2 if short_legend else 0.4,
        columnspacing=0.8 if short_legend else 1.6,
    )
    _name_points(figure, axes, rows, numbers_only)


def _join_sweeps(axes: Axes, rows: Sequence[Row]) -> None:
    """A line through the points of each sweep."""
    for _, line in sweeps(rows):
        scores = [_point(row) for row in line]
        axes.plot(
            [harmful.value for harmful, _ in scores],
            [accuracy.value for _, accuracy in scores],
            color=COLOURS["defended"],
            linewidth=0.9,
            alpha=0.6,
            zorder=2,
        )


def _name_points(figure: Figure, axes: Axes, rows: Sequence[Row], numbers_only: bool) -> None:
    points = [axes.transData.transform((a.value, b.value)) for a, b in map(_point, rows)]
    groups = _near(points)
    texts = [_label([rows[index] for index in group], numbers_only) for group in groups]
    places = [(float(points[group[0]][0]), float(points[group[0]][1])) for group in groups]
    frame = axes.get_window_extent()
    inside = Box(frame.x0 + 3, frame.y0 + 3, frame.x1 + 8, frame.y1 - 1)
    sizes = [_text_size(figure, text, SIZE) for text in texts]
    obstacles = [box for row in rows for box in _drawn(axes, row)]
    obstacles += [_box(text.get_window_extent()) for text in axes.texts]  # the mark of the better corner
    for text, point, spot in zip(texts, places, place(places, sizes, obstacles, inside), strict=True):
        if spot is None:
            continue  # the result table still gives the point's scores
        back = axes.transData.inverted()
        if spot.leader is not None:
            ends = back.transform([point, spot.leader])
            axes.plot(ends[:, 0], ends[:, 1], color=COLOURS["muted"], linewidth=0.7, zorder=2)
        x, y = back.transform((spot.box.left, spot.box.bottom))
        axes.text(x, y, text, fontsize=SIZE, ha="left", va="bottom", clip_on=False, zorder=4)


def _near(points: Sequence[Any]) -> list[list[int]]:
    """Group points by index: each group holds the points near its first one, as a reader sees them."""
    groups: list[list[int]] = []
    for index, point in enumerate(points):
        for group in groups:
            if math.dist(points[group[0]], point) <= NEAR:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _label(rows: Sequence[Row], numbers_only: bool) -> str:
    if not numbers_only:
        return "\n".join(one_line(row.label, 30) for row in rows)
    numbers = [str(row.number) for row in rows]
    return "\n".join(", ".join(numbers[start : start + 4]) for start in range(0, len(numbers), 4))


def _box(extent: Any) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _mark_corner(axes: Axes, short: bool) -> None:
    """Say which corner is the better one: few harmful answers, and many correct ones."""
    axes.annotate(
        "better" if short else "better: safe and accurate",
        (0.0, 1.0),
        xycoords="axes fraction",
        xytext=(22, -10),
        textcoords="offset points",
        ha="left",
        va="center",
        color=COLOURS["good"],
        fontsize=SIZE,
        weight="bold",
        arrowprops={"arrowstyle": "-|>", "color": COLOURS["good"], "linewidth": 1.4, "shrinkB": 1},
    )


def _text_size(figure: Figure, text: str, size: float) -> tuple[float, float]:
    probe = figure.text(0, 0, text, fontsize=size)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width, extent.height


def _drawn(axes: Axes, row: Row) -> list[Box]:
    """The marker and the error bars of a row, in pixels."""
    harmful, accuracy = _point(row)
    x, y = axes.transData.transform((harmful.value, accuracy.value))
    boxes = [Box(x - 5, y - 5, x + 5, y + 5)]
    if harmful.stderr:
        left, right = (harmful.value - harmful.stderr, harmful.value + harmful.stderr)
        (x0, _), (x1, _) = axes.transData.transform([(left, accuracy.value), (right, accuracy.value)])
        boxes.append(Box(x0, y - 2, x1, y + 2))
    if accuracy.stderr:
        low, high = (accuracy.value - accuracy.stderr, accuracy.value + accuracy.stderr)
        (_, y0), (_, y1) = axes.transData.transform([(harmful.value, low), (harmful.value, high)])
        boxes.append(Box(x - 2, y0, x + 2, y1))
    return boxes


def _accuracy_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Axis limits that include every error bar, span at least 20 points and stay close to 0 to 100."""
    pairs = [(score.value, score.stderr or 0.0) for _, score in map(_point, rows)]
    low = min(value - error for value, error in pairs)
    high = max(value + error for value, error in pairs)
    pad = max((high - low) * 0.12, (20 - (high - low)) / 2, 2.0)
    return max(low - pad, -4.0), min(high + pad, 104.0)


def _point(row: Row) -> tuple[Score, Score]:
    harmful, accuracy = row.scores["harmful_score"], row.scores["finetune_accuracy"]
    assert harmful is not None  # `plotted` keeps only rows with both scores
    assert accuracy is not None
    return harmful, accuracy


def _point_text(row: Row) -> str:
    harmful, accuracy = _point(row)
    task = small(task_title([row]))
    return f"{harm_title([row])} {score_text(harmful.value)}, {task} {score_text(accuracy.value)}"


def _side_table(figure: Figure, rows: Sequence[Row]) -> None:
    """Write number, name, harmful score and accuracy of each row at the right of the plot."""
    height = figure.get_size_inches()[1] * 72
    columns = ((712, "left"), (1050, "right"), (1160, "right"))
    lines: list[tuple[Any, ...]] = [("", f"{harm_title(rows)} ↓", f"{small(task_title(rows))} ↑")]
    for row in rows:
        cells = [_cell(row.scores["harmful_score"]), _cell(row.scores["finetune_accuracy"])]
        lines.append((f"{row.number}  {one_line(row.label, 32)}", *cells))
    for index, line in enumerate(lines):
        y = 1 - (44 + 24 * index) / height
        for (x, align), text in zip(columns, line, strict=True):
            colour = COLOURS["muted"] if index == 0 or text == NOT_MEASURED else COLOURS["ink"]
            figure.text(x / 1180, y, text, ha=align, va="center", fontsize=11, color=colour)


def _cell(score: Score | None) -> str:
    if score is None:
        return NOT_MEASURED
    return score_text(score.value) + (f" ± {score_text(score.stderr)}" if score.stderr is not None else "")
