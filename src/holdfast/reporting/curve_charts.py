"""Small charts of the training curves: loss, gradient norm and drift over the steps of one stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.reporting.svg import COLOURS, figure_of, inline, margins, style
from holdfast.reporting.text import one_line
from holdfast.reporting.training import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BANDS = 80
"""Phases are shaded up to this number; more of them would merge into one grey area."""

DASHES: Sequence[tuple[str, Any]] = (
    ("mark", "-"),
    ("undefended", (0, (5, 2))),
    ("ink", (0, (1, 1))),
    ("defended", (0, (4, 1, 1, 1))),
)
"""Colour and dashes of the lines that share a chart, in the order in which the method declares them."""


def curves_svg(curves: Curves, index: int, limits: dict[str, float]) -> str | None:
    """Plot loss, gradient norm and drift over the steps of one stage; return None if the log has no numbers.

    `limits` holds the shared upper axis limit of each panel, if `shared_limits` found one.
    """
    panels = [(title, names) for title, names in curves.panels().items() if _drawable(curves, names)]
    if not panels:
        return None
    with style():
        figure = figure_of(340, 40 + 106 * len(panels))
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(**margins(figure, left=50, right=10, bottom=40, top=22), hspace=0.42)
        for axes, (title, names) in zip(grid, panels, strict=True):
            _panel(axes, curves, title, names, limits.get(title))
        grid[-1].set_xlabel("step")
        return inline(figure, f"curves-{index}", _curves_text(curves, panels))


def shared_limits(curves: Sequence[Curves]) -> dict[str, float]:
    """The upper axis limit of each panel that all charts share, unless it would flatten one of them."""
    limits = {}
    for title in dict.fromkeys(title for one in curves for title in one.panels()):
        tops = [top for one in curves if (top := _top(one, one.panels().get(title, ()))) is not None]
        if len(tops) > 1 and min(tops) > 0 and max(tops) <= 4 * min(tops):
            limits[title] = max(tops) * 1.05
    return limits


def _finite(curves: Curves, name: str) -> list[float]:
    return [value for value in curves.series.get(name, ([], []))[1] if math.isfinite(value)]


def _drawable(curves: Curves, names: Sequence[str]) -> bool:
    return any(_finite(curves, name) for name in names)


def _shown(curves: Curves, names: Sequence[str]) -> list[str]:
    """The losses that a method logs separately if there are any; else the common loss."""
    present = [name for name in names if _finite(curves, name)]
    apart = [name for name in present if name != "loss"]
    return apart or present


def _line(names: Sequence[str], name: str) -> tuple[str, Any]:
    """Colour and dashes of a line of a chart."""
    if name == "loss":
        return "defended", "-"
    apart = [other for other in names if other != "loss"]
    return ("ink", "-") if len(apart) == 1 else DASHES[apart.index(name) % len(DASHES)]


def _top(curves: Curves, names: Sequence[str]) -> float | None:
    return max((value for name in _shown(curves, names) for value in _finite(curves, name)), default=None)


def _panel(axes: Axes, curves: Curves, title: str, names: Sequence[str], top: float | None) -> None:
    states = curves.states()
    if len(states) <= BANDS:
        for first, last, state in states:
            if state == "alignment":
                axes.axvspan(first, last, color=COLOURS["band"], alpha=0.16, linewidth=0)
        for first, _, _ in states[1:]:
            axes.axvline(first, color=COLOURS["mark"], linewidth=0.5, linestyle=(0, (2, 2)))
    shown = _shown(curves, names)
    for name in shown:
        role, dashes = _line(names, name)
        steps, values = curves.series[name]
        single = len(_finite(curves, name)) == 1
        axes.plot(
            steps,
            values,
            color=COLOURS[role],
            linestyle=dashes,
            linewidth=1.4,
            marker="o" if single else "",
            markersize=4,
            label=one_line(curves.shown[name][1], 40),
        )
    axes.set_title(one_line(title, 40), loc="left", fontsize=10, color=COLOURS["ink"], pad=4)
    if len(shown) > 1:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.02, 0.98),
            ncols=2,
            fontsize=9,
            borderaxespad=0,
            handlelength=1.6,
        )
    axes.set_xlim(0, max(1, curves.max_steps))
    low = min(value for name in shown for value in _finite(curves, name))
    if low >= 0:
        axes.set_ylim(0, top or (_top(curves, names) or 1.0) * 1.05)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=5)


def _curves_text(curves: Curves, panels: Sequence[tuple[str, Sequence[str]]]) -> str:
    parts = []
    for _, names in panels:
        for name in _shown(curves, names):
            values = _finite(curves, name)
            parts.append(f"{one_line(curves.shown[name][1], 40)} from {values[0]:.3g} to {values[-1]:.3g}")
    return f"{curves.stage} stage, {curves.label}, {curves.max_steps} steps: {', '.join(parts)}."
