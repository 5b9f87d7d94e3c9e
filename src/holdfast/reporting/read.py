"""Read JSON files into plain values. Errors name the file and the line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import DataError


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        DataError: the file cannot be read, is incomplete, or holds something other than an object.
    """
    value = _parse(_text(path), path, first_line=1)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {_kind(value)}.")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a JSONL file; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, or a line is incomplete or holds something other than an object.
    """
    rows = []
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        value = _parse(text, path, first_line=line)
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {line}: expected a JSON object, found {_kind(value)}.")
        rows.append(value)
    return rows


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None: a NaN in a log means "not measured"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is an object, else an empty one: optional parts of a file may be null."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; anything else counts as absent."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_of(value: Any) -> str | None:
    """`value` as text; None stays None."""
    return None if value is None else str(value)


def values_of(raws: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The numbers under `key`, of the objects that have one."""
    return [value for raw in raws if (value := number(raw.get(key))) is not None]


def total(raws: Sequence[Mapping[str, Any]], key: str) -> int | None:
    """The sum of the numbers under `key`, or None if an object lacks it: it would look like the whole sum."""
    values = values_of(raws, key)
    return round(sum(values)) if values and len(values) == len(raws) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected a JSON text file, found bytes that are not UTF-8.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read {path}: {reason}.") from None


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}: incomplete or damaged JSON ({error.msg}). "
            "Call `holdfast run` again to write what is missing."
        ) from None
    except RecursionError:
        raise DataError(f"{path}: this JSON is nested too deeply for a Holdfast file.") from None


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
