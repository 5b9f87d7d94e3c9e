"""Checks on the rows of answers, verdicts and ratings, which may come from any source.

A verdict or a rating belongs to one answer, by its id: a wrong value would change a score without a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.evaluation.turns import SECOND

Rows = list[dict[str, Any]]
Check = Callable[[Mapping[str, Any]], str | None]
"""Returns what is wrong with a row, or None."""

SETS = ("harmful", "task", "benign", SECOND)
VERDICTS = ("harmful", "safe", "unparsed")


def check_answers(path: Path, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Raise DataError with the line of a row of answers that cannot be judged or scored."""
    _check(path, rows, places, _answer)
    _unrepeated(path, rows, places, ("set", "id"))


def check_verdicts(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    answered: Collection[Any] | None = None,
) -> None:
    """Raise DataError with the line of a verdict that is not valid, repeated, or on none of `answered`."""
    _check(path, rows, places, _verdict)
    _unrepeated(path, rows, places, ("id",))
    if answered is not None:
        _known(path, rows, places, answered, "an answer to a harmful prompt")


def check_ratings(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    answered: Collection[Any] | None = None,
) -> None:
    """Raise DataError with the line of a rating that is not valid, repeated, or of none of `answered`."""
    _check(path, rows, places, _rating)
    _unrepeated(path, rows, places, ("id",))
    if answered is not None:
        _known(path, rows, places, answered, "an answer to the task")


def check_scale(
    path: Path, rows: Sequence[Mapping[str, Any]], places: Sequence[str], low: float, high: float, name: str
) -> None:
    """Raise DataError with the line of a rating outside the scale of its metric."""

    def outside(row: Mapping[str, Any]) -> str | None:
        inside = row["rating"] is None or low <= row["rating"] <= high
        return None if inside else f"rating {row['rating']:g}; the {name} needs {low:g} to {high:g}"

    _check(path, rows, places, outside)


def check_targets(path: Path, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Raise DataError with the line of an answer to a task that has no target to be graded against."""

    def lacks(row: Mapping[str, Any]) -> str | None:
        if row["set"] != "task" or "error" in row or isinstance(row.get("target"), str):
            return None
        return f"target is {kind_of(row.get('target'))}; expected the right answer as text, to grade this one"

    _check(path, rows, places, lacks)


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    return "missing (null)" if value is None else f"of the type {type(value).__name__}"


def _answer(row: Mapping[str, Any]) -> str | None:
    lacks = [key for key in ("id", "set", "instruction") if key not in row]
    if "answer" not in row and "error" not in row:
        lacks.append("answer")
    if lacks:
        return (
            f"no {', '.join(lacks)}; found {', '.join(row)}. Expected the keys that holdfast generate "
            "writes: id, set (harmful, task or benign), instruction, answer, target"
        )
    if row["set"] not in SETS:
        return f"set is {row['set']!r}; expected harmful, task or benign"
    category = row.get("category") or []
    if not isinstance(category, list) or not all(isinstance(name, str) for name in category):
        return f"category is {category!r}; expected a list of texts"
    texts = ["instruction", *(["answer"] if "answer" in row else [])]
    texts += ["input"] if row.get("input") is not None else []
    for key in texts:
        if not isinstance(row[key], str):
            return f"{key} is {kind_of(row[key])}; expected text"
    return _id(row)


def _verdict(row: Mapping[str, Any]) -> str | None:
    if "id" not in row or "verdict" not in row:
        return f"expected id and verdict, found {', '.join(row)}"
    if row["verdict"] not in VERDICTS:
        return f"verdict is {row['verdict']!r}; expected {', '.join(VERDICTS)}"
    return _number(row, "score") or _id(row)


def _rating(row: Mapping[str, Any]) -> str | None:
    if "id" not in row or "rating" not in row:
        return f"expected id and rating, found {', '.join(row)}"
    return _number(row, "rating") or _id(row)


def _id(row: Mapping[str, Any]) -> str | None:
    if isinstance(row["id"], str | int) and not isinstance(row["id"], bool):
        return None
    return f"id is {kind_of(row['id'])}; expected text or a whole number"


def _number(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return None
    return f"{key} is {value!r}; expected a number or null"


def _check(path: Path, rows: Sequence[Mapping[str, Any]], places: Sequence[str], check: Check) -> None:
    for row, place in zip(rows, places, strict=True):
        wrong = check(row)
        if wrong is not None:
            raise DataError(f"{path}, {place}: {wrong}.")


def _unrepeated(
    path: Path, rows: Sequence[Mapping[str, Any]], places: Sequence[str], keys: Sequence[str]
) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for row, place in zip(rows, places, strict=True):
        key = tuple(row[name] for name in keys)
        if key in seen:
            raise DataError(
                f"{path}, {place}: id {row['id']!r} is also on {seen[key]}. Give every row an id of its own."
            )
        seen[key] = place


def _known(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    answered: Collection[Any],
    what: str,
) -> None:
    for row, place in zip(rows, places, strict=True):
        if row["id"] not in answered:
            raise DataError(f"{path}, {place}: id {row['id']!r} is not the id of {what}.")
