"""Each model compared with the undefended model, as columns of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from holdfast.reporting.measurements import Row, harm_title
from holdfast.reporting.table import Cell, Column, task_title
from holdfast.reporting.tested import SCORES, Difference, baselines, differences
from holdfast.reporting.text import one_line, p_text, score_text, signed


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
    titles = {"harmful_score": harm_title(rows).capitalize(), "benign_compliance": "Benign compliance"}
    title = titles.get(name) or task_title(rows)
    cells = tuple(_cell(found[row.number]) if row.number in found else Cell("–") for row in rows)
    return Column(f"{title}: difference", SCORES[name], _explain(found.values()), cells)


def _explain(found: Iterable[Difference]) -> str:
    """How the differences were tested."""
    ways = {one.over_seeds for one in found}
    return "in points, of means over seeds" if ways == {True} else "in points, on the same prompts"


def _cell(difference: Difference) -> Cell:
    details = []
    if difference.interval is not None:
        details.append(f"[{score_text(difference.interval[0])}, {score_text(difference.interval[1])}]")
    details.append(f"p {p_text(difference.p)}")
    seeds = f", {difference.seeds} seeds" if difference.seeds > 1 else ""
    details.append(f"n = {difference.n}{seeds}" if difference.n is not None else seeds.strip(", "))
    if not difference.clear:
        details.append("not distinguishable")
    short = f"p {p_text(difference.p)}" if difference.clear else "not distinguishable"
    return Cell(signed(difference.value), tuple(details), short=short)
