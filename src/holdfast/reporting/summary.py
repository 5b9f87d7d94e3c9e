"""The compact table at the top of the page: one line a model."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.reporting.collect import ReportData
from holdfast.reporting.measurements import harm_title
from holdfast.reporting.table import Cell, Column, result_table, task_title
from holdfast.reporting.tested import Difference
from holdfast.reporting.text import p_text, score_text, signed


def summary_table(data: ReportData, found: Mapping[int, Difference]) -> tuple[Column, ...]:
    """The columns of the compact table, with the difference `found` in the harmful score of each row."""
    full = {column.title: column for column in result_table(data).columns}
    harm, task = harm_title(data.rows).capitalize(), task_title(data.rows)
    ratios = {row.poison_ratio for row in data.rows if row.user is not None}
    names = [*(["Harmful rows"] if len(ratios) > 1 else []), harm, task]
    columns = [full[name] for name in (*names, "Benign compliance", "Training time") if name in full]
    if found:
        change = Column(
            "Change", "lower", harm.lower(), tuple(_change(found.get(row.number)) for row in data.rows)
        )
        columns.insert(names.index(harm) + 1, change)
    return tuple(columns)


def _change(found: Difference | None) -> Cell:
    if found is None:
        return Cell("–")
    details = [f"p {p_text(found.p)}"]
    if found.interval is not None:
        details.insert(0, f"[{score_text(found.interval[0])}, {score_text(found.interval[1])}]")
    return Cell(signed(found.value), tuple(details), short="" if found.clear else "not clear")
