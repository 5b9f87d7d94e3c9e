"""The files of an evaluation, and the `FILE.json` beside each, which says what made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, OutputError
from holdfast.machine.files import read_json, read_jsonl, write_json
from holdfast.machine.store import provenance

Rows = list[dict[str, Any]]


def claim(out: Path, made: Mapping[str, Any]) -> None:
    """Write `FILE.json` beside a file that is about to be appended to.

    Raises:
        OutputError: the file is there and was made otherwise, or cannot be written.
    """
    if out.exists() or beside(out).exists():
        earlier = made_by(out)
        if earlier is None:
            raise OutputError(
                f"{out} exists, and no {beside(out).name} says what made it. Choose another --out."
            )
        other = [key for key in {**made, **earlier} if earlier.get(key) != made.get(key)]
        if other:
            what = "; ".join(f"{key}: {earlier.get(key)} there, {made.get(key)} now" for key in sorted(other))
            raise OutputError(
                f"{out} was made with other settings ({what}). Choose another --out, or remove it."
            )
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside(out), {"made": dict(made), "provenance": provenance()})
        out.touch()
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}.") from None


def beside(out: Path) -> Path:
    """The file that says what made `out`."""
    return out.with_name(f"{out.name}.json")


def made_by(path: Path) -> dict[str, Any] | None:
    """What made a file, if that is known."""
    return read_json(beside(path))["made"] if beside(path).is_file() else None


def forget_failed(out: Path) -> None:
    """Take the rows with an `error` out of a file of answers, so that they are asked for again."""
    rows = read_jsonl(out)
    answered = [row for row in rows if "error" not in row]
    if len(answered) < len(rows):
        datasets.write_rows(out, answered)


def read_answers(path: Path) -> Rows:
    """Rows that hold `id`, `set`, `instruction` and `answer` (or `error`).

    Raises:
        DataError: a file without them, with the line.
    """
    rows = read_whole(path)
    for i, row in enumerate(rows, 1):
        lacks = [key for key in ("id", "set", "instruction") if key not in row]
        if "answer" not in row and "error" not in row:
            lacks.append("answer")
        if lacks:
            raise DataError(
                f"{path}, line {i}: no {', '.join(lacks)}; found {', '.join(row)}. Expected what holdfast "
                "generate writes: id, set (harmful, task or benign), instruction, answer, target."
            )
    return rows


def read_whole(path: Path) -> Rows:
    """The rows of a file. Raises DataError: there are none."""
    rows = datasets.read_rows(path)
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows
