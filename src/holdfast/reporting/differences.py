"""Each model compared with the undefended model on the same prompts, as columns of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.reporting.measurements import Row
from holdfast.reporting.table import Cell, Column, task_title
from holdfast.reporting.tested import SCORES, Difference, baselines, differences
from holdfast.reporting.text import one_line, score_text


def differences_table(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The baseline of each row and the difference in every score; empty if nothing can be compared."""
    against = baselines(rows)
    found = {name: differences(rows, against, name) for name in SCORES}
    columns = [_column(rows, name, cells) for name, cells in found.items() if cells]
    if not columns:
        return ()
    named = [against.get(row.number) for row in rows]
    cells = tuple(
        Cell("–") if row is None else Cell(f"{row.number} {one_line(row.label, 48)}") for row in named
    )
    return (
        Column("Compared with", "", "the undefended model, else the model before fine-tuning", cells),
        *columns,
    )


def _column(rows: Sequence[Row], name: str, found: Mapping[int, Difference]) -> Column:
    titles = {"harmful_score": "Harmful score", "benign_compliance": "Benign compliance"}
    title = titles.get(name) or task_title(rows)
    cells = tuple(_cell(found[row.number]) if row.number in found else Cell("–") for row in rows)
    return Column(f"{title}: difference", SCORES[name], "in points, on the same prompts", cells)


def _cell(difference: Difference) -> Cell:
    result = difference.result
    text = score_text(result.difference)
    details = []
    if result.interval is not None:
        details.append(f"[{score_text(result.interval[0])}, {score_text(result.interval[1])}]")
    details.append(f"p {p_text(difference.p)}")
    details.append(f"n = {result.n}" + (f", {difference.seeds} seeds" if difference.seeds > 1 else ""))
    if not difference.clear:
        details.append("not distinguishable")
    return Cell(text if text.startswith("-") or text == "0.0" else f"+{text}", tuple(details))


def p_text(p: float) -> str:
    """A p-value with its relation sign: "= 0.012" or "< 0.0001"."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"
