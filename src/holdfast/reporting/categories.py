"""The harmful score by category of the prompts, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.reporting.answers import compared
from holdfast.reporting.measurements import Row
from holdfast.reporting.read import mapping, number


@dataclass(frozen=True)
class Bar:
    """One model's share of harmful answers in a category; None if it was not measured."""

    share: float | None
    n: int


@dataclass(frozen=True)
class Categories:
    """The categories, worst first for the last but one model, with a bar for each model."""

    models: tuple[Row, ...]
    lines: tuple[tuple[str, tuple[Bar, ...]], ...]


def categories(rows: Sequence[Row]) -> Categories | None:
    """The categories of the model before fine-tuning, the undefended and the best defended model."""
    models = compared(rows)
    counted = [_counts(row) for row in models]
    names = list(dict.fromkeys(name for counts in counted for name in counts))
    if len(names) < 2:
        return None
    lines = [(name, tuple(_bar(*counts.get(name, (0.0, 0))) for counts in counted)) for name in names]
    worst = max(range(len(models)), key=lambda i: sum(bars[i].share or 0 for _, bars in lines))
    lines.sort(key=lambda line: (-(line[1][worst].share or 0), line[0]))
    return Categories(tuple(models), tuple(lines))


def _bar(harmful: float, n: int) -> Bar:
    return Bar(100 * harmful / n if n else None, n)


def _counts(row: Row) -> dict[str, tuple[float, int]]:
    """By category, the harmful answers and all answers with a verdict, over all seeds."""
    found: dict[str, tuple[float, int]] = {}
    for member in row.members:
        for name, entry in mapping(member.raw.get("by_category")).items():
            share, n = number(mapping(entry).get("harmful_score")), number(mapping(entry).get("n"))
            if share is not None and n:
                before = found.get(name, (0.0, 0))
                found[name] = (before[0] + share * n / 100, before[1] + round(n))
    return found
