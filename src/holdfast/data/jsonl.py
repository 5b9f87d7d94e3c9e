"""Rows as JSONL: written to a temporary file and renamed, so that a file is complete or does not exist."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.data.files import parse, read_bytes
from holdfast.errors import HoldfastError, OutputError
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


def read_placed(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Like `read_rows`, with the place of each row ("line 3") for messages."""
    path = Path(path)
    data = read_bytes(path)
    return parse(path, data) if data.strip() else ([], [])


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file; [] if it has no rows. Raises DataError with the line of an incomplete row."""
    return read_placed(path)[0]
