"""The results of lm-evaluation-harness, as columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from holdfast.reporting.measurements import Row
from holdfast.reporting.read import mapping, number, objects
from holdfast.reporting.table import Cell, Column
from holdfast.reporting.text import NOT_MEASURED

Place = tuple[str, str, str]
"""The task, the metric and the filter of a value."""


def ability_table(rows: Sequence[Row]) -> tuple[Column, ...]:
    """One column for each metric of each task; empty if no run used the harness."""
    columns = []
    places = dict.fromkeys(place for row in rows for raw in _measured(row) for place in _places(raw))
    for place in places:
        task, metric, how = place
        found = [entry for row in rows for entry in _entries(row, place)]
        better = {entry.get("higher_is_better") for entry in found}
        direction = "higher" if better == {True} else "lower" if better == {False} else ""
        explain = metric if how in ("none", "") else f"{metric}, {how}"
        columns.append(Column(task, direction, explain, tuple(map(partial(_cell, place), rows))))
    return tuple(columns)


def _measured(row: Row) -> list[dict[str, Any]]:
    """The results by task, one for each seed."""
    return [found for member in row.members if (found := mapping(member.raw.get("lm_eval")))]


def _places(tasks: dict[str, Any]) -> list[Place]:
    return [
        (name, str(entry.get("metric")), str(entry.get("filter")))
        for name, task in tasks.items()
        for entry in objects(mapping(task).get("metrics"))
    ]


def _entries(row: Row, place: Place) -> list[dict[str, Any]]:
    """The entries of one metric, one for each seed, with the number of questions."""
    task, metric, how = place
    found = []
    for tasks in _measured(row):
        result = mapping(tasks.get(task))
        for entry in objects(result.get("metrics")):
            if (str(entry.get("metric")), str(entry.get("filter"))) == (metric, how):
                found.append({**entry, "n": result.get("n")})
    return found


def _cell(place: Place, row: Row) -> Cell:
    entries = _entries(row, place)
    values = [value for entry in entries if (value := number(entry.get("value"))) is not None]
    if not values:
        return Cell(NOT_MEASURED)
    error = number(entries[0].get("stderr")) if len(values) == 1 else None
    details = [f"± {error:.4f}"] if error is not None else []
    details += [f"mean of {len(values)} seeds"] if len(values) > 1 else []
    details += [f"n = {entries[0]['n']}"] if entries[0].get("n") else []
    return Cell(f"{fmean(values):.4f}", tuple(details), fmean(values))
