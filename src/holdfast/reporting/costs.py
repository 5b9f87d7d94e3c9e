"""The costs of a run: one table for each part of the run, with the columns that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from holdfast.reporting.measurements import Row
from holdfast.reporting.read import mapping, number
from holdfast.reporting.table import Cell, Column
from holdfast.reporting.text import NOT_MEASURED, bytes_text, duration_text

TITLES = {"alignment": "Alignment", "user": "Fine-tuning", "generate": "Answers"}

Costs = Sequence[Mapping[str, Any]]
"""The costs of one part of one row, one mapping for each seed."""


def cost_tables(rows: Sequence[Row]) -> list[tuple[str, tuple[Column, ...]]]:
    """The title and the columns of each part; a row without that part has "–" in every column."""
    found = {}
    for part in _parts(rows):
        costs = [_costs(row, part) for row in rows]
        columns = [
            Column(title, "", explain(costs), tuple(_cell(one, key, text, pick) for one in costs))
            for title, explain, key, text, pick in COLUMNS
        ]
        measured = [c for c in columns if any(cell.text not in ("–", NOT_MEASURED) for cell in c.cells)]
        if measured:
            found[TITLES.get(part, f"Verdicts of {part}")] = tuple(measured)
    return list(found.items())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _kinds(key: str) -> Callable[[Sequence[Costs]], str]:
    """How the costs were measured, as they record it under `key`."""

    def kinds(costs: Sequence[Costs]) -> str:
        told = dict.fromkeys(str(cost[key]) for one in costs for cost in one if cost.get(key) is not None)
        return ", ".join(told)

    return kinds


def _says(text: str) -> Callable[[Sequence[Costs]], str]:
    return lambda costs: text


COLUMNS: tuple[tuple[str, Callable[[Sequence[Costs]], str], str, Callable[[float], str], Any], ...] = (
    ("Time", _says("wall clock"), "seconds", duration_text, _mean),
    ("Time per 1000 steps", _says("wall clock"), "seconds_per_1000_steps", duration_text, _mean),
    ("Device time", _kinds("device_time"), "device_seconds", duration_text, _mean),
    (
        "Device time per 1000 steps",
        _kinds("device_time"),
        "device_seconds_per_1000_steps",
        duration_text,
        _mean,
    ),
    (
        "Tokens per second",
        _says("over all processes"),
        "tokens_per_second",
        lambda value: f"{value:,.0f}",
        _mean,
    ),
    ("Peak memory", _kinds("peak_memory_kind"), "peak_memory_bytes", bytes_text, max),
    ("Reserved memory", _says("cuda reserved"), "peak_reserved_bytes", bytes_text, max),
    (
        "Energy",
        _says("from the GPU's counter"),
        "energy_joules",
        lambda value: f"{value / 1000:.3g} kJ",
        _mean,
    ),
)


def _parts(rows: Sequence[Row]) -> list[str]:
    judges = [
        name
        for row in rows
        for member in row.members
        for name in mapping(mapping(member.raw.get("cost")).get("moderate"))
    ]
    return [*TITLES, *dict.fromkeys(judges)]


def _costs(row: Row, part: str) -> Costs:
    """The costs of `part` for each seed that has them."""
    of_seeds = [mapping(member.raw.get("cost")) for member in row.members]
    found = [mapping((of if part in TITLES else mapping(of.get("moderate"))).get(part)) for of in of_seeds]
    return [cost for cost in found if cost]


def _cell(
    costs: Costs, key: str, text: Callable[[float], str], pick: Callable[[Sequence[float]], float]
) -> Cell:
    if not costs:
        return Cell("–")
    values = [value for cost in costs if (value := number(cost.get(key))) is not None]
    if len(values) < len(costs):  # a value over some of the seeds would look like one over all
        return Cell(NOT_MEASURED)
    return Cell(text(pick(values)))
