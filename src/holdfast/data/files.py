"""Read local data files (JSONL, JSON, CSV, TSV and parquet) into records, with the place of every row.

A file that cannot be read completely is an error that names the file and the line, so that an incomplete
file is not mistaken for a shorter one.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import DataError, first_line

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
PACKED = {".gz": "gzip", ".xz": "xz"}

Place = str  # "line 3", "row 3", "item 3": the place of a record in its file


def file_kind(path: Path) -> str | None:
    """ "jsonl", "json", "csv", "tsv", "parquet", or None; a final ".gz" or ".xz" is ignored."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        kind = SUFFIXES.get(suffixes[0])
        return None if kind == "parquet" else kind
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_bytes(path: Path) -> bytes:
    """Read the bytes of a regular file. Raises DataError: not a regular file, or not readable."""
    with _opened(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, computed in constant memory. Raises like `read_bytes`."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        if not path.is_file():  # a pipe would block, and could not be read a second time
            raise DataError(f"{path} is not a regular file. Expected a file: {ACCEPTED}.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse(path: Path, data: bytes, columns: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[Place]]:
    """Parse `data`, the bytes of the file `path`, into records and the place of each.

    Args:
        columns: the column names of a CSV that may have no header line, as some are published.

    Raises:
        DataError: the file is of an unknown kind, empty, binary, not UTF-8, incomplete, has rows of different
            lengths, or holds something other than records.
    """
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path} is not a known kind of file. Expected {ACCEPTED}.")
    if packed := PACKED.get(path.suffix.lower()):
        try:
            data = gzip.decompress(data) if packed == "gzip" else lzma.decompress(data)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{path} is not a complete {packed} file: {error}.") from error
    if not data:
        raise DataError(f"{path} is empty. Expected rows.")
    if kind == "parquet":
        pairs = _parquet(path, data)
    else:
        text = _decode(path, data)
        if kind == "csv":
            pairs = _csv(path, text, columns)
        else:
            pairs = {"jsonl": _jsonl, "json": _json, "tsv": _tsv}[kind](path, text)
    found = list(pairs)
    if not found:
        raise DataError(f"{path} has no rows.")
    return [record for record, _ in found], [place for _, place in found]


def _decode(path: Path, data: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8.")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: binary data. Expected text: {ACCEPTED}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        control = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in data[:4096])
        if control > len(data[:4096]) / 50:
            raise DataError(f"{path}, line {line}: binary data. Expected text: {ACCEPTED}.") from error
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}). "
            "Save the file as UTF-8; it may be Windows-1252 or Latin-1."
        ) from error


def _load(text: str) -> Any:
    """`json.loads` that raises ValueError for values nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _jsonl(path: Path, text: str) -> Iterator[tuple[dict, Place]]:
    # Not splitlines(): U+2028 and similar characters are text inside a JSON string.
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _load(line)
        except ValueError as error:
            hint = " If the file is one JSON list, name it .json." if i == 1 and line[0] in "[{" else ""
            raise DataError(f"{path}, line {i}: not complete JSON ({error}).{hint}") from error
        if not isinstance(value, dict):
            raise DataError(
                f"{path}, line {i}: expected a JSON object, found {_shown(value)}."
                + (" If the file is one JSON list, name it .json." if isinstance(value, list) else "")
            )
        yield value, f"line {i}"


def _json(path: Path, text: str) -> Iterator[tuple[dict, Place]]:
    try:
        value = _load(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many ".json" files hold one object per line
            yield from _jsonl(path, text)
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
        if not isinstance(item, dict):
            raise DataError(f"{path}, item {i}: expected an object, found {_shown(item)}.")
        yield item, f"item {i}"


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


def _cells(path: Path, names: list[str], cells: list[str], line: int) -> tuple[dict, Place]:
    if len(cells) != len(names):
        raise DataError(
            f"{path}, line {line}: {len(cells)} cells, but the header has {len(names)} "
            f"({', '.join(names)}). Check for a missing or extra separator or quote."
        )
    return dict(zip(names, cells, strict=True)), f"line {line}"


def _csv(path: Path, text: str, columns: Sequence[str] = ()) -> Iterator[tuple[dict, Place]]:
    """RFC 4180: quoted cells may hold commas, line breaks and doubled quotes. A row's line is its first."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(CELL_LIMIT)
    names, start = None, 1
    try:
        for cells in reader:
            if cells and names is None:
                headless = columns and not _is_header(cells)
                names = list(columns) if headless else _header(path, cells)
                if headless:
                    yield _cells(path, names, cells, start)
            elif cells and names is not None:
                yield _cells(path, names, cells, start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: not complete CSV ({error}). Check for a missing or extra quote."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _tsv(path: Path, text: str) -> Iterator[tuple[dict, Place]]:
    """TSV as in GLUE: quotes are ordinary characters, and a cell holds no tab and no line break."""
    names = None
    for i, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        if names is None:
            names = _header(path, line.split("\t"))
        else:
            yield _cells(path, names, line.split("\t"), i)


def _parquet(path: Path, data: bytes) -> Iterator[tuple[dict, Place]]:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a complete parquet file: {first_line(error)}") from error
    for i, record in enumerate(records, 1):
        yield record, f"row {i}"
