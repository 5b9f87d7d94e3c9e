"""The plot of a Safe LoRA run: cosine by layer, coloured by kind of module."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import OutputError
from holdfast.machine.files import beside
from holdfast.reporting.svg import COLOURS, figure_of, margins, style
from holdfast.reporting.text import one_line

KINDS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c6d31")
"""Colours that most colour-blind readers can distinguish (Okabe and Ito, without yellow)."""
MARKERS = "os^Dv<>P"


def save_cosines(record: Mapping[str, Any], path: Path) -> Path:
    """Plot the modules of a `safe_lora.json`: filled markers are projected, hollow ones are not.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    modules = [module for module in record["modules"] if module["cosine"] is not None]
    kinds = sorted({module["kind"] for module in modules})
    threshold = record["options"]["threshold"]
    with style():
        figure = figure_of(900, 460)
        axes = figure.add_subplot()
        figure.subplots_adjust(**margins(figure, left=58, right=170, bottom=46, top=16))
        for number, kind in enumerate(kinds):
            points = [module for module in modules if module["kind"] == kind]
            colour = KINDS[number % len(KINDS)]
            depth = [-1 if module["layer"] is None else module["layer"] for module in points]
            height = [module["cosine"] for module in points]
            axes.plot(depth, height, color=colour, linewidth=0.9, alpha=0.5)
            axes.scatter(
                depth,
                height,
                s=34,
                marker=MARKERS[number % len(MARKERS)],
                edgecolors=colour,
                facecolors=[colour if module["projected"] else COLOURS["surface"] for module in points],
                linewidths=1.3,
                label=one_line(kind, 20),
                zorder=3,
            )
        if isinstance(threshold, int | float) and not isinstance(threshold, bool):
            axes.axhline(threshold, color=COLOURS["mark"], linewidth=1.1, linestyle="--")
            axes.annotate(
                f"threshold {threshold:g}",
                (1.0, threshold),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS["mark"],
                annotation_clip=False,
            )
        axes.set_xlabel("layer  (-1: outside the layers)" if None in _layers(modules) else "layer")
        axes.set_ylabel("cosine of dW and C dW  (filled: projected)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kinds:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)
        try:
            with beside(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=144)
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path


def check_place(path: Path) -> None:
    """Check before long work that a picture can be written to `path`; creates its folder.

    Raises:
        OutputError: the picture cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from None
    if path.is_dir():
        raise OutputError(f"Cannot write {path}: it is a folder.")


def _layers(modules: list[dict[str, Any]]) -> set[int | None]:
    return {module["layer"] for module in modules}
