"""The files of an evaluation, and the `FILE.json` beside each, which records how the file was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, OutputError
from holdfast.evaluation.frames import without_thinking
from holdfast.machine.files import read_json, read_jsonl, write_json
from holdfast.machine.store import provenance

Rows = list[dict[str, Any]]


def claim(out: Path, made: Mapping[str, Any]) -> None:
    """Write `FILE.json` beside `out` before rows are appended to `out`.

    Raises:
        OutputError: the file exists and was made with other settings, or cannot be written.
    """
    if out.exists() or beside(out).exists():
        earlier = made_by(out)
        if earlier is None:
            raise OutputError(
                f"{out} exists, but without a {beside(out).name} that says how it was made. "
                "Choose another --out."
            )
        other = [key for key in {**made, **earlier} if earlier.get(key) != made.get(key)]
        if other:
            what = "; ".join(f"{key}: was {earlier.get(key)}, now {made.get(key)}" for key in sorted(other))
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
    """The file that records how `out` was made."""
    return out.with_name(f"{out.name}.json")


def made_by(path: Path) -> dict[str, Any] | None:
    """The settings that a file was made with, or None if they are not known."""
    return read_json(beside(path))["made"] if beside(path).is_file() else None


def forget_failed(out: Path) -> None:
    """Remove the rows with an `error` from a file of answers, so that they are generated again."""
    rows = read_jsonl(out)
    answered = [row for row in rows if "error" not in row]
    if len(answered) < len(rows):
        datasets.write_rows(out, answered)


def read_answers(path: Path) -> Rows:
    """Read rows with `id`, `set`, `instruction` and `answer` (or `error`), without the answers' thinking.

    Raises:
        DataError: a row lacks one of them; the message has its line.
    """
    rows = read_whole(path)
    for i, row in enumerate(rows, 1):
        lacks = [key for key in ("id", "set", "instruction") if key not in row]
        if "answer" not in row and "error" not in row:
            lacks.append("answer")
        if lacks:
            raise DataError(
                f"{path}, line {i}: no {', '.join(lacks)}; found {', '.join(row)}. Expected the keys that "
                "holdfast generate writes: id, set (harmful, task or benign), instruction, answer, target."
            )
    return without_thinking(rows)


def read_whole(path: Path) -> Rows:
    """Read the rows of a file. Raises DataError if there are none."""
    rows = datasets.read_rows(path)
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows
