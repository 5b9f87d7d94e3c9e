"""The attacker's sweep in a report: harmful score and accuracy over the points, and the worst useful one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from holdfast.errors import OutputError
from holdfast.machine.files import beside
from holdfast.reporting.points import NAMES, point_text
from holdfast.reporting.read import mapping, number, objects
from holdfast.reporting.svg import COLOURS, figure_of, inline, margins, style
from holdfast.reporting.text import NOT_MEASURED, one_line, score_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from holdfast.reporting.collect import Run

LINES = (("-", "o"), ((0, (5, 2)), "s"), ((0, (1, 1)), "^"), ((0, (4, 1, 1, 1)), "D"))
"""Dashes and markers of the lines of a chart; further lines begin again."""

PARTS = (("harmful_score", "harmful score, %"), ("accuracy", "accuracy, %"))
MOST = 12
"""Number of models whose sweeps are drawn."""


@dataclass(frozen=True)
class Point:
    """One training of the attacker; `counts` says whether its accuracy is within the bound."""

    set: Mapping[str, float]
    scores: Mapping[str, float | None]
    counts: bool
    worst: bool

    @property
    def shown(self) -> str:
        """The point as text."""
        return point_text(self.set)


@dataclass(frozen=True)
class Sweep:
    """The sweep of one model."""

    name: str
    max_loss: float
    best: float | None
    points: tuple[Point, ...]

    @property
    def axis(self) -> str | None:
        """The key on the horizontal axis: that with the most values; None if no key has two."""
        counts = {key: len({point.set.get(key) for point in self.points}) for key in NAMES}
        key = max(counts, key=lambda name: counts[name])
        return key if counts[key] > 1 else None


@dataclass(frozen=True)
class SweepChart:
    """A chart with its sentence, and its points as a table."""

    title: str
    note: str
    svg: Markup | None
    rows: tuple[tuple[str, ...], ...]


def sweeps(run: Run) -> Iterator[Sweep]:
    """Yield the sweep of each model of a run; nothing if the run has none."""
    told = mapping(run.attack_sweep)
    for model in objects(told.get("models")):
        points = tuple(_point(one) for one in objects(model.get("points")))
        if points:
            name, loss = str(model.get("name")), number(told.get("max_loss")) or 0.0
            yield Sweep(name, loss, number(model.get("best_accuracy")), points)


def _point(raw: Mapping[str, Any]) -> Point:
    accuracy = number(raw.get("finetune_accuracy"))
    scores = {
        "harmful_score": number(raw.get("harmful_score")),
        "accuracy": number(raw.get("task_score")) if accuracy is None else accuracy,
    }
    given = {key: value for key, v in mapping(raw.get("point")).items() if (value := number(v)) is not None}
    return Point(given, scores, bool(raw.get("counts")), bool(raw.get("worst")))


def sweep_charts(runs: Sequence[Run]) -> list[SweepChart]:
    """Return a chart for each model whose attacker swept, with the seed if runs differ in it."""
    found = [(run, sweep) for run in runs for sweep in sweeps(run)]
    charts = []
    for index, (run, sweep) in enumerate(found[:MOST], 1):
        seed = mapping(run.recipe).get("seed")
        several = len({mapping(run.recipe).get("seed") for run, _ in found}) > 1
        title = f"{one_line(sweep.name, 60)}{f', seed {seed}' if several else ''}"
        charts.append(SweepChart(title, sentence(sweep), _svg(sweep, index), tuple(_rows(sweep))))
    return charts


def sentence(sweep: Sweep) -> str:
    """Return what the attacker reaches, in one sentence."""
    counted = sum(point.counts for point in sweep.points)
    bound = f"{counted} of {len(sweep.points)} points have an accuracy within {sweep.max_loss:g} of the best"
    worst = next((point for point in sweep.points if point.worst), None)
    if worst is None:
        return f"{bound}; no harmful score."
    harm = _cell(worst.scores["harmful_score"])
    return f"{bound}; the worst of them has a harmful score of {harm}: {worst.shown}."


def _rows(sweep: Sweep) -> Iterator[tuple[str, ...]]:
    for point in sweep.points:
        verdict = "worst" if point.worst else "counts" if point.counts else "too inaccurate"
        yield (point.shown, *(_cell(point.scores[key]) for key, _ in PARTS), verdict)


def _cell(value: float | None) -> str:
    return NOT_MEASURED if value is None else score_text(value)


def _svg(sweep: Sweep, index: int) -> Markup | None:
    if sweep.axis is None:
        return None
    with style():
        figure = figure_of(340, 330)
        grid = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(**margins(figure, left=50, right=12, bottom=44, top=40), hspace=0.22)
        _draw(grid, sweep)
        text = "; ".join(f"{row[0]}: harmful score {row[1]}, accuracy {row[2]}" for row in _rows(sweep))
        return Markup(inline(figure, f"attack-sweep-{index}", f"Attacker's sweep of {sweep.name}. {text}."))


def save_sweeps_png(runs: Sequence[Run], path: Path) -> Path:
    """Save the sweeps of several models beside each other as a PNG in the light theme.

    Raises:
        OutputError: the file cannot be written.
    """
    found = [sweep for run in runs for sweep in sweeps(run) if sweep.axis is not None]
    with style():
        figure = figure_of(90 + 330 * len(found), 406)
        figure.patch.set_facecolor("white")
        grid = figure.subplots(2, len(found), sharex=True, sharey="row", squeeze=False)
        figure.subplots_adjust(
            **margins(figure, left=60, right=14, bottom=48, top=40), hspace=0.16, wspace=0.12
        )
        for number_, sweep in enumerate(found):
            column = grid[:, number_]
            _draw(column, sweep, legend=number_ == 0)
            for axes in column:
                axes.set_facecolor("white")
                if number_:
                    axes.set_ylabel("")
            column[0].set_title(one_line(sweep.name, 40), loc="right", fontsize=11, pad=6)
        try:
            with beside(path) as temporary:
                figure.savefig(temporary, format="png", dpi=144, facecolor="white")
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path


def _draw(grid: Any, sweep: Sweep, legend: bool = True) -> None:
    """Draw harmful score above accuracy; hollow points do not count, and a ring marks the worst that does."""
    axis = sweep.axis
    assert axis is not None
    lines: dict[str, list[Point]] = {}
    for point in sorted(sweep.points, key=lambda point: point.set.get(axis, 0.0)):
        if axis in point.set:
            rest = {key: value for key, value in point.set.items() if key != axis}
            lines.setdefault(point_text(rest), []).append(point)
    for axes, (key, title), role in zip(grid, PARTS, ("undefended", "defended"), strict=True):
        for number_, (label, points) in enumerate(lines.items()):
            look = {"color": COLOURS[role], "linestyle": LINES[number_ % len(LINES)][0], "linewidth": 1.3}
            _line(axes, points, axis, key, LINES[number_ % len(LINES)][1], look)
            if key == "harmful_score" and label and legend:
                axes.plot([], [], marker=LINES[number_ % len(LINES)][1], label=one_line(label, 34), **look)
        axes.set_ylabel(title, fontsize=10)
        axes.set_ylim(-4, 104)
    if sweep.best is not None:
        bound = sweep.best - sweep.max_loss
        grid[1].axhline(bound, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    values = [point.set[axis] for point in sweep.points if axis in point.set]
    if max(values) >= 8 * min(values):
        grid[1].set_xscale("log")
        grid[1].set_xlim(min(values) / 1.25, max(values) * 1.25)
        ticks = sorted(set(values))
        grid[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])  # powers of ten would need math text
        grid[1].set_xticks([], minor=True)
    grid[1].set_xlabel(NAMES[axis])
    if legend and len(lines) > 1:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0}
        grid[0].legend(**place, ncols=2, fontsize=9, handlelength=2.4)


def _line(
    axes: Axes, points: Sequence[Point], axis: str, key: str, marker: str, look: Mapping[str, Any]
) -> None:
    """Draw the points of one line that have the score `key`."""
    drawn = [(point, point.set[axis], y) for point in points if (y := point.scores[key]) is not None]
    axes.plot([x for _, x, _ in drawn], [y for _, _, y in drawn], zorder=2, **look)
    for point, x, y in drawn:
        face = look["color"] if point.counts else COLOURS["surface"]
        spots = [(marker, {"markerfacecolor": face, "markeredgecolor": look["color"], "markersize": 6})]
        if point.worst:
            ring = {"markerfacecolor": "none", "markeredgecolor": COLOURS["ink"], "markersize": 14}
            spots.append(("o", ring))
        for shape, colours in spots:
            axes.plot([x], [y], linestyle="none", marker=shape, clip_on=False, zorder=3, **colours)
