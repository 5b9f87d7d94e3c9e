"""Convert a matplotlib figure to an inline SVG that follows the page's theme."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from holdfast.reporting.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1b1f24",
    "muted": "#59616b",
    "grid": "#dfe3e8",
    "surface": "#fefefe",
    "reference": "#5d6673",
    "undefended": "#b54708",
    "defended": "#0b6bcb",
    "band": "#7d6bd1",
    "mark": "#6a4fc3",
    "good": "#16784a",
    "line1": "#0072b3",
    "line2": "#c04e00",
    "line3": "#007a5a",
    "line4": "#a3467f",
    "line5": "#7a6200",
    "line6": "#4d4d4e",
}
"""The light theme, and the page's CSS variables of the same names. Each role has its own hex code."""


@contextmanager
def style() -> Iterator[None]:
    """Draw with our fonts and colours, without changing matplotlib's global state."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: it can be selected and uses the page's font
        "svg.hashsalt": "holdfast",  # the same data gives the same bytes
        "font.size": 11,
        "axes.edgecolor": COLOURS["muted"],
        "axes.labelcolor": COLOURS["ink"],
        "axes.facecolor": COLOURS["surface"],
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": COLOURS["grid"],
        "grid.linewidth": 0.8,
        "text.color": COLOURS["ink"],
        "text.parse_math": False,  # a name may contain a dollar sign
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "figure.facecolor": COLOURS["surface"],
        "figure.dpi": 72,  # one unit of the SVG is one CSS pixel
        "legend.frameon": False,
    }
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            # The browser's font draws scripts that are missing from the font used for measuring text.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield
    finally:
        log.setLevel(level)


def figure_of(width: float, height: float) -> Figure:
    """A figure of `width` by `height` CSS pixels whose canvas can measure text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def margins(figure: Figure, *, left: float, right: float, bottom: float, top: float) -> dict[str, float]:
    width, height = (size * 72 for size in figure.get_size_inches())
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": bottom / height,
        "top": 1 - top / height,
    }


def inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for HTML: no DTD, no external reference, ids that start with `name`.

    Call it within `style()`. `description` is the text for screen readers; a pointer shows its
    first sentence.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="svg",
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    body = buffer.getvalue().decode("utf-8")
    body = body[body.index("<svg") :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'\b(id|href)="(#?)', rf'\1="\2{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r" font-family: [^;]*;", "", body)
    for role, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r"\n\s*", "\n", body)
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    said = escape(clean(description), quote=True)
    short = escape(clean(description.partition(". ")[0]))
    opening = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{said}"><title>{short}</title>'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: opening, body)
