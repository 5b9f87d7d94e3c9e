"""Read local data files (JSONL, JSON, CSV, TSV and parquet) record by record, with the place of each.

A file that cannot be read completely is an error that names the file and the line, so that an incomplete
file is not mistaken for a shorter one. A single line that is wrong is a record with its reason. Only one line
or one batch of rows is in memory, except for a `.json` file that is one list.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.data.packed import PACKED, unpacked
from holdfast.data.tables import parquet_records
from holdfast.errors import DataError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
ACCEPTED = (
    "JSONL (.jsonl, .ndjson), JSON (.json), CSV (.csv), TSV (.tsv), each also as .gz or .xz, and .parquet"
)
# A cell may hold a whole conversation; Python's default limit is 128 KiB.
CELL_LIMIT = 2**27
"""Maximum number of bytes of a line, and of characters of a CSV cell."""


class Placed(NamedTuple):
    """A record of a file with its place ("line 3"); a record that cannot be read has a reason instead.

    `hint` is a sentence on what to do.
    """

    place: str
    record: dict[str, Any]
    wrong: str = ""
    hint: str = ""


def file_kind(path: Path) -> str | None:
    """ "jsonl", "json", "csv", "tsv", "parquet", or None; a final ".gz" or ".xz" is ignored."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        kind = SUFFIXES.get(suffixes[0])
        return None if kind == "parquet" else kind
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def has_rows(path: Path) -> bool:
    """Whether a regular file has anything but white space. Raises DataError if it cannot be read."""
    with _opened(path) as file:
        return any(line.strip() for line in iter(lambda: file.read(2**16), b""))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in constant memory. Raises DataError: not a file, or not readable."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        if not path.exists():
            raise DataError(f"There is no file {path}.")
        if not path.is_file():  # a pipe would block, and could not be read a second time
            raise DataError(f"{path} is not a regular file. Expected a file: {ACCEPTED}.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def records(path: Path, columns: Sequence[str] = ()) -> Iterator[Placed]:
    """Yield the records of a file, with the place of each.

    Args:
        columns: the column names of a CSV that may have no header line, as some are published.

    Raises:
        DataError: the file is of an unknown kind, empty, binary, not UTF-8, or incomplete, or holds something
            other than records.
    """
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path} is not a known kind of file. Expected {ACCEPTED}.")
    found = 0
    with _opened(path) as file:
        if not file.peek(1):
            raise DataError(f"{path} is empty. Expected rows.")
        if kind == "parquet":
            rows = enumerate(parquet_records(path, file), 1)
            placed: Iterator[Placed] = (Placed(f"row {i}", record) for i, record in rows)
        else:
            placed = _text_records(path, kind, unpacked(path, file), columns)
        for found, one in enumerate(placed, 1):  # noqa: B007
            yield one
    if not found:
        raise DataError(f"{path} has no rows.")


def _text_records(
    path: Path, kind: str, stream: io.BufferedIOBase, columns: Sequence[str]
) -> Iterator[Placed]:
    if not stream.peek(1):  # type: ignore[attr-defined]
        raise DataError(f"{path} is empty. Expected rows.")
    lines = _lines(path, stream)
    if kind == "csv":
        return _csv(path, lines, columns)
    parse: Callable[..., Iterator[Placed]] = {"jsonl": _jsonl, "json": _json, "tsv": _tsv}[kind]
    return parse(path, lines)


Lines = Iterator[tuple[int, str]]


def _lines(path: Path, stream: io.BufferedIOBase) -> Lines:
    """The numbered lines of a UTF-8 file, with or without a byte order mark, each with its end."""
    start = stream.peek(4096)[:4096]  # type: ignore[attr-defined]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8.")
    if b"\0" in start:
        raise _binary(path, start[: start.index(b"\0")].count(b"\n") + 1)
    for number, line in enumerate(iter(lambda: stream.readline(CELL_LIMIT + 1), b""), 1):
        if len(line) > CELL_LIMIT:
            raise DataError(f"{path}, line {number}: the line is longer than {CELL_LIMIT // 2**20} MiB.")
        if b"\0" in line:
            raise _binary(path, number)
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            control = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in start)
            if control > len(start) / 50:
                raise _binary(path, number) from error
            raise DataError(
                f"{path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}). "
                "Save the file as UTF-8; it may be Windows-1252 or Latin-1."
            ) from error


def _binary(path: Path, line: int) -> DataError:
    return DataError(f"{path}, line {line}: binary data. Expected text: {ACCEPTED}.")


def _load(text: str) -> Any:
    """`json.loads` that raises ValueError for values nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _jsonl(path: Path, lines: Lines) -> Iterator[Placed]:
    # Not splitlines(): U+2028 and similar characters are text inside a JSON string.
    for number, line in lines:
        if not line.strip():
            continue
        place = f"line {number}"
        hint = "If the file is one JSON list, name it .json."
        try:
            value = _load(line)
        except ValueError as error:
            wrong = f"not complete JSON ({error})"
            if number == 1 and line.strip() in ("[", "{", "[{"):
                raise DataError(f"{path}, {place}: {wrong}. {hint}") from error
            yield Placed(place, {}, wrong, hint if number == 1 and line[0] in "[{" else "")
            continue
        if isinstance(value, dict):
            yield Placed(place, value)
        else:
            wrong = f"expected a JSON object, found {_shown(value)}"
            yield Placed(place, {}, wrong, hint if isinstance(value, list) else "")


def _json(path: Path, lines: Lines) -> Iterator[Placed]:
    """One list of objects, `{"data": [...]}`, or one object per line, as many ".json" files have."""
    first = next(lines, (1, ""))
    second = next(lines, None)
    alone = _object(first[1])
    if alone is not None and second is not None and not isinstance(alone.get("data"), list):
        yield from _jsonl(path, _joined((first, second), lines))
        return
    text = "".join(line for _, line in _joined((first, second) if second else (first,), lines))
    try:
        value = _load(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path, iter(enumerate(text.split("\n"), 1)))
            return
        raise DataError(f"{path}, line {error.lineno}: not complete JSON ({error.msg}).") from error
    except ValueError as error:
        raise DataError(f"{path}: the JSON cannot be read ({error}).") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and "\n" not in text.strip():
        value = [value]  # one object on one line: a JSONL file with one row
    if not isinstance(value, list):
        raise DataError(
            f'{path}: expected a list of objects, or {{"data": [...]}}; found {_shown(value)}.'
            " If each line is an object, name it .jsonl."
        )
    for i, item in enumerate(value, 1):
        fits = isinstance(item, dict)
        wrong = "" if fits else f"expected an object, found {_shown(item)}"
        yield Placed(f"item {i}", item if fits else {}, wrong)


def _joined(first: Sequence[tuple[int, str]], rest: Lines) -> Lines:
    """The lines that were read already, then the others."""
    yield from first
    yield from rest


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object in a line, or None if the line holds anything else."""
    with contextlib.suppress(ValueError):
        value = _load(line)
        return value if isinstance(value, dict) else None
    return None


def _shown(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = f"the column '{twice[0]}' twice" if twice and twice[0] else "a column without a name"
        raise DataError(f"{path}, line 1: the header has {what}. Expected a different name for each column.")
    return names


def _is_header(cells: Sequence[str]) -> bool:
    """Whether the first line of a CSV holds column names: these have one or two words, prompts have more."""
    return all(len(cell.split()) <= 2 and len(cell) <= 30 for cell in cells)


def _cells(names: list[str], cells: list[str], line: int) -> Placed:
    if len(cells) != len(names):
        wrong = f"{len(cells)} cells, but the header has {len(names)} ({', '.join(names)})"
        return Placed(f"line {line}", {}, wrong, "Check for a missing or extra separator or quote.")
    return Placed(f"line {line}", dict(zip(names, cells, strict=True)))


def _csv(path: Path, lines: Lines, columns: Sequence[str] = ()) -> Iterator[Placed]:
    """RFC 4180: quoted cells may hold commas, line breaks and doubled quotes. A row's line is its first."""
    # A carriage return alone ends a line too, as in files of old systems.
    parts = (part for _, line in lines for part in re.split(r"(?<=\r)(?!\n|$)", line))
    reader = csv.reader(parts, strict=True)
    limit = csv.field_size_limit(CELL_LIMIT)
    names, start = None, 1
    try:
        for cells in reader:
            if cells and names is None:
                headless = columns and not _is_header(cells)
                names = list(columns) if headless else _header(path, cells)
                if headless:
                    yield _cells(names, cells, start)
            elif cells and names is not None:
                yield _cells(names, cells, start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: not complete CSV ({error}). Check for a missing or extra quote."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _tsv(path: Path, lines: Lines) -> Iterator[Placed]:
    """TSV as in GLUE: quotes are ordinary characters, and a cell holds no tab and no line break."""
    names = None
    for number, line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if not line:
            continue
        if names is None:
            names = _header(path, line.split("\t"))
        else:
            yield _cells(names, line.split("\t"), number)
