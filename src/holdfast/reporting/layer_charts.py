"""The layers that a method drew and their probabilities, as a heat map of layer by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from holdfast.reporting.svg import COLOURS, figure_of, inline, margins, style
from holdfast.reporting.training import Curves, Layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = 6
"""Number of shades between probability 0 and the highest of the chart; more could not be distinguished."""

Segments = tuple[list[float], list[float]]
"""x and y of horizontal strokes, with a gap after each: many strokes form one path of the SVG."""


def layers_svg(curves: Curves, index: int) -> str | None:
    """Plot probabilities as shades and draws as strokes, layer by step; None if the run recorded neither."""
    found = curves.layers
    if found is None:
        return None
    from matplotlib.ticker import MaxNLocator

    row = min(18.0, max(7.0, 240 / found.count))
    with style():
        figure = figure_of(340, 70 + row * found.count)
        axes = figure.add_subplot()
        figure.subplots_adjust(**margins(figure, left=50, right=18, bottom=40, top=30))
        end = max(1, curves.max_steps)
        top = max((p for _, row in found.probabilities for p in row), default=0.0)
        _shades(axes, found, end, top, row)
        strokes = _strokes(found, end)
        width = max(1.5, row / 5)
        axes.plot(*strokes, color=COLOURS["ink"], linewidth=width, solid_capstyle="butt", label="drawn")
        axes.set_xlim(0, end)
        axes.set_ylim(-0.5, found.count - 0.5)
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        axes.grid(False)
        axes.locator_params(axis="x", nbins=5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=3,
            fontsize=9,
            borderaxespad=0,
            handlelength=1.4,
            columnspacing=1.2,
        )
        for line in legend.get_lines():
            line.set_linewidth(min(line.get_linewidth(), 9))
        return inline(figure, f"layers-{index}", _layers_text(curves, found))


def layer_table(layers: Layers, steps: int) -> list[tuple[str, str, str, str]]:
    """For each layer: its number, first and last probability, and the share of steps it was drawn for."""
    table = []
    drawn = drawn_steps(layers, steps)
    for layer in range(layers.count):
        ends = [row[layer] for _, row in (*layers.probabilities[:1], *layers.probabilities[-1:])]
        first, last = (f"{p:.3f}" for p in ends) if ends else ("–", "–")
        table.append((str(layer), first, last, f"{100 * drawn[layer] / max(1, steps):.0f} %"))
    return table


def drawn_steps(layers: Layers, steps: int) -> list[float]:
    """The number of steps for which each layer was drawn."""
    found = [0.0] * layers.count
    for begin, end, chosen in _intervals(layers.draws, steps):
        for layer in chosen:
            found[int(layer)] += end - begin
    return found


def _intervals(
    history: Sequence[tuple[float, tuple[float, ...]]], steps: float
) -> list[tuple[float, float, tuple[float, ...]]]:
    """(first step, end, values) of each entry; an entry is valid until the next one."""
    ends = [*(step for step, _ in history), max(steps, history[-1][0] if history else 0)]
    return [(a, b, values) for (a, b), (_, values) in zip(pairwise(ends), history, strict=True) if b > a]


def _shades(axes: Axes, layers: Layers, end: float, top: float, row: float) -> None:
    """One path for each shade; the lightest and the darkest appear in the legend."""
    shaded: dict[int, Segments] = {shade: ([], []) for shade in range(1, SHADES + 1)}
    for begin, until, probabilities in _intervals(layers.probabilities, end):
        for layer, probability in enumerate(probabilities):
            if probability > 0:
                shade = min(SHADES, math.ceil(SHADES * probability / top))
                _stroke(shaded[shade], begin, until, layer)
    for shade, strokes in shaded.items():
        axes.plot(
            *strokes,
            color=COLOURS["mark"],
            alpha=0.75 * shade / SHADES,
            linewidth=row - 1,
            solid_capstyle="butt",
            label=f"p ≤ {top * shade / SHADES:.2g}" if shade in (1, SHADES) else None,
        )


def _strokes(layers: Layers, end: float) -> Segments:
    """A stroke for each layer and draw; consecutive draws of the same layer share one stroke."""
    found: Segments = ([], [])
    intervals = _intervals(layers.draws, end)
    for layer in range(layers.count):
        begin = None
        for start, until, chosen in intervals:
            if layer in chosen:
                begin = start if begin is None else begin
                last = until
            elif begin is not None:
                _stroke(found, begin, last, layer)
                begin = None
        if begin is not None:
            _stroke(found, begin, last, layer)
    return found


def _stroke(segments: Segments, begin: float, end: float, layer: float) -> None:
    segments[0].extend((begin, end, math.nan))
    segments[1].extend((layer, layer, math.nan))


def _layers_text(curves: Curves, layers: Layers) -> str:
    drawn = drawn_steps(layers, curves.max_steps)
    order = sorted(range(layers.count), key=lambda layer: -drawn[layer])
    most = ", ".join(
        f"{layer} ({100 * drawn[layer] / max(1, curves.max_steps):.0f} %)" for layer in order[:3]
    )
    return (
        f"Layers drawn by {curves.label} over {curves.max_steps} steps: {layers.count} layers, "
        f"probabilities computed {len(layers.probabilities)} times, {len(layers.draws)} draws. "
        f"Drawn for most steps: {most}. The table below lists all layers."
    )
