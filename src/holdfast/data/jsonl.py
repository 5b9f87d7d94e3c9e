"""Rows as JSONL: written to a temporary file and renamed, so that a file is complete or does not exist."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.data.files import has_rows, records
from holdfast.errors import DataError, HoldfastError, OutputError
from holdfast.machine import files


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line, in UTF-8, replacing `path` atomically.

    Raises:
        OutputError: the folder cannot be written to.
        HoldfastError: the disk is full.
    """
    path = Path(path)
    try:
        files.write_jsonl(path, rows)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> HoldfastError:
    """The error for a failed write: HoldfastError if the disk is full, else OutputError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HoldfastError(f"No space left to write {path}. Free some disk space and run again.")
    return OutputError(f"{path} cannot be written: {error.strerror or error}. Choose another place.")


def each_row(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a JSONL file one by one, each with its place ("line 3").

    Raises:
        DataError: a row is incomplete; the message has its line.
    """
    path = Path(path)
    if not has_rows(path):
        return
    for place, record, wrong, hint in records(path):
        if wrong:
            raise DataError(f"{path}, {place}: {wrong}. {hint}".strip())
        yield record, place


def read_placed(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Like `read_rows`, with the place of each row ("line 3") for messages."""
    found = list(each_row(path))
    return [row for row, _ in found], [place for _, place in found]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file; [] if it has no rows. Raises DataError with the line of an incomplete row."""
    return read_placed(path)[0]
