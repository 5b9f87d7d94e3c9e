"""The report: one self-contained page from any number of runs. It reads JSON only and needs no torch."""

from __future__ import annotations

from holdfast.reporting.collect import unfinished
from holdfast.reporting.exporting import export
from holdfast.reporting.writing import report

__all__ = [
    "collect",
    "cosines",
    "export",
    "gated",
    "grouped",
    "points",
    "read",
    "report",
    "sheets",
    "text",
    "unfinished",
]
