"""Paths in the checkout, and the code blocks of its pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared" / "data"
"""Slices of the published data sets, which are not part of the project."""

HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "pandas"}
"""Packages that light commands, such as list and plan, do not import."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)
