"""Where things of the checkout are, and what stands in its pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared" / "data"
"""Slices of the published data sets, which are no part of the project."""

HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "pandas"}
"""Packages that listing, planning and the like do not import."""


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)
