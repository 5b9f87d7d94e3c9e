"""The agreement of every two judges, as columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from holdfast.reporting.measurements import Row
from holdfast.reporting.read import mapping, number, objects
from holdfast.reporting.table import Cell, Column
from holdfast.reporting.text import NOT_MEASURED

Pair = tuple[str, str]


def agreement_table(rows: Sequence[Row]) -> tuple[Column, ...]:
    """For every two judges: Cohen's kappa, and the number of answers that only one of them calls harmful."""
    columns = []
    for pair in dict.fromkeys(pair for row in rows for pair in _pairs(row)):
        title = f"{pair[0]} and {pair[1]}"
        parts = (
            (f"{title} agree", "share of answers; kappa: 0 is agreement by chance", partial(_agree, pair)),
            (f"only {pair[0]}", f"says harmful; {pair[1]} says safe", partial(_only, pair, "only_first")),
            (f"only {pair[1]}", f"says harmful; {pair[0]} says safe", partial(_only, pair, "only_second")),
        )
        columns += [Column(name, "", explain, tuple(map(cell, rows))) for name, explain, cell in parts]
    return tuple(columns)


def _entries(row: Row) -> list[dict[str, Any]]:
    return [entry for member in row.members for entry in objects(member.raw.get("agreement"))]


def _pairs(row: Row) -> list[Pair]:
    judges = [entry.get("judges") for entry in _entries(row)]
    return [(str(j[0]), str(j[1])) for j in judges if isinstance(j, list) and len(j) == 2]


def _of(pair: Pair, row: Row) -> list[dict[str, Any]]:
    """The entries of this pair of judges, one for each seed."""
    return [mapping(entry) for entry in _entries(row) if entry.get("judges") == list(pair)]


def _agree(pair: Pair, row: Row) -> Cell:
    entries = _of(pair, row)
    if not entries:
        return Cell(NOT_MEASURED)
    values = [value for entry in entries if (value := number(entry.get("kappa"))) is not None]
    agree = [value for entry in entries if (value := number(entry.get("agree"))) is not None]
    # Without kappa, both judges give every answer the same verdict.
    details = [f"kappa {fmean(values):.2f}" if values else "all verdicts alike"]
    details += [f"mean of {len(entries)} seeds"] if len(entries) > 1 else []
    details += [f"n = {_sum(entries, 'n')}"]
    unparsed = _sum(entries, "one_unparsed")
    details += [f"{unparsed} unparsed by one judge"] if unparsed else []
    return Cell(f"{fmean(agree):.1f} %" if agree else NOT_MEASURED, tuple(details))


def _only(pair: Pair, which: str, row: Row) -> Cell:
    entries = _of(pair, row)
    return Cell(str(_sum(entries, which))) if entries else Cell(NOT_MEASURED)


def _sum(entries: Sequence[dict[str, Any]], key: str) -> int:
    return round(sum(value for entry in entries if (value := number(entry.get(key))) is not None))
