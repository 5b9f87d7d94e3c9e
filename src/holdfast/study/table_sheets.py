"""A compared table as sheets for a screen or a paper, and as one record for each cell."""

from __future__ import annotations

from typing import Any

from holdfast.reporting.sheets import Sheet
from holdfast.reporting.text import plain
from holdfast.study.compared import Cell, Compared
from holdfast.study.published import METRICS, TEXTS, Metric
from holdfast.study.tables import SMALL

EMPTY = ""
"""A published number that is not known."""


def sheets(found: Compared) -> list[Sheet]:
    """One sheet for each metric: of each row the published numbers, the measured ones and the difference.

    If nothing was measured, only the published numbers.
    """
    of, several = found.table, len(found.stamps) > 1
    made = []
    for metric in of.metrics:
        kind = METRICS[metric]
        rows: list[tuple[str, ...]] = []
        for row in of.numbers:
            cells = [cell for cell in found.cells if (cell.row, cell.metric) == (row, metric)]
            if not cells:
                continue
            rows.append((row, "published", *(_number(cell.published, kind) for cell in cells)))
            if found.model is not None:
                rows.append(("", "measured", *(_measured(cell, kind, several) for cell in cells)))
                rows.append(("", "difference", *(_difference(cell, kind) for cell in cells)))
        title = f"{of.title}: {kind.title.lower()} ({kind.unit}, {kind.better} is better)"
        made.append(Sheet(title, ("", "", *of.columns), tuple(rows), left=2))
    last = made[-1]
    made[-1] = Sheet(last.title, last.columns, last.rows, tuple(notes(found)), last.left)
    return made


def notes(found: Compared) -> list[str]:
    """The lines below a table: source, setting, what was measured and how."""
    of = found.table
    lines = [f"Published: {of.cited}. {of.setting}.", *found.notes]
    if found.model in SMALL:
        what = (
            "the embedded world's tiny model"
            if found.model == "world"
            else "SmolLM2 (135 million parameters)"
        )
        lines.append(f"Measured on {what}: compare the order of the methods, not the numbers.")
    measured = [cell.measured for cell in found.cells if cell.measured is not None]
    if any(one.seeds > 1 for one in measured):
        lines.append("± is the standard error over seeds; the number of seeds follows in brackets.")
    if any(one.seeds == 1 and one.stderr is not None for one in measured):
        lines.append("± of one seed is the standard error over the answers: other seeds can differ more.")
    if found.changes:
        lines.append(f"Settings that differ from the table's grid: {'; '.join(found.changes)}.")
    for number, stamp in enumerate(found.stamps):
        mark = f" [{_letter(number)}]" if len(found.stamps) > 1 else ""
        told = "; ".join(f"{key}: {plain(value)}" for key, value in stamp.items())
        lines.append(f"Protocol stamp{mark}: {told}.")
    return lines


def records(found: Compared) -> list[dict[str, Any]]:
    """One record for each cell."""
    return [_record(found.table.name, cell) for cell in found.cells]


def _record(table: str, cell: Cell) -> dict[str, Any]:
    kind, mean = METRICS[cell.metric], cell.measured
    low, high = (mean.interval if mean else None) or (None, None)
    return {
        "table": table, "row": cell.row, "column": cell.column, "metric": cell.metric, "unit": kind.unit,
        "better": kind.better, "published": cell.published,
        "measured": _rounded(mean.value if mean else None), "difference": _rounded(cell.difference),
        "stderr": _rounded(mean.stderr if mean else None),
        "low": _rounded(low), "high": _rounded(high), "seeds": mean.seeds if mean else None,
        "why": cell.why or None, "stamp": None if cell.stamp is None else cell.stamp + 1,
    }  # fmt: skip


def whole(found: Compared) -> dict[str, Any]:
    """The table, its cells, stamps and notes as plain values."""
    of = found.table
    return {
        "name": of.name,
        **{key: getattr(of, key) for key in TEXTS},
        "model": found.model,
        "cells": records(found),
        "stamps": list(found.stamps),
        "changes": list(found.changes),
        "notes": list(found.notes),
    }


def _number(value: float | None, kind: Metric) -> str:
    return EMPTY if value is None else f"{value:.{kind.decimals}f}"


def _measured(cell: Cell, kind: Metric, letters: bool) -> str:
    if cell.measured is None:
        return cell.why
    text = f"{cell.measured.value:.{kind.decimals}f}"
    if cell.measured.stderr is not None:
        text += f" ± {cell.measured.stderr:.{kind.decimals}f}"
    if cell.measured.seeds > 1:
        text += f" ({cell.measured.seeds})"
    return f"{text} [{_letter(cell.stamp)}]" if letters and cell.stamp is not None else text


def _difference(cell: Cell, kind: Metric) -> str:
    return EMPTY if cell.difference is None else f"{cell.difference:+.{kind.decimals}f}"


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number + 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
