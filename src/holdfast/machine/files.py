"""Files and folders written atomically (a temporary one is renamed), and JSONL files that are appended to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.machine.scratch import temporary

SUMS = ".sums"
"""The folder beside appended rows, in a step that is not complete, with the SHA-256 of each row."""


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it when the block ends; it is removed on an error.

    A reader sees either the old file or the complete new one.
    """
    with temporary(path) as made:
        yield made
        made.chmod(mode(0o666))
        made.replace(path)


def mode(asked: int) -> int:
    """Return the permissions of a new file (0o666) or folder (0o777) under the umask of this process."""
    umask = os.umask(0o077)
    os.umask(umask)
    return asked & ~umask


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8; see `beside`."""
    with beside(path) as made, made.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """`write_text` for JSON. NaN is refused, because it is not valid JSON."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_text` for one JSON object per line; only one row is in memory."""
    with beside(path) as made, made.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(as_line(row))
        file.flush()
        os.fsync(file.fileno())


def as_line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSONL. Halves of surrogate pairs, which UTF-8 does not have, are escaped."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row) + "\n"
    return line


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSONL."""
    return "".join(map(as_line, rows))


def read_json(path: Path) -> Any:
    """Read the value in a JSON file. Raises ValueError if it is damaged, also if it is nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file that rows are appended to; an incomplete last line, left by a kill, is removed from it.

    Raises:
        DataError: another line is damaged.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with path.open("rb+") as file:
            file.truncate(end)
    rows = []
    for i, line in enumerate(whole[:end].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}, line {i}: not complete JSON ({error}). Remove that line and run again."
            ) from None
    return rows


def each_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that rows are appended to, one by one; an incomplete last line is removed.

    Raises:
        DataError: another line is damaged.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        for number, line in enumerate(iter(file.readline, b""), 1):
            if not line.endswith(b"\n"):
                file.truncate(file.tell() - len(line))
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not complete JSON ({error}). Remove that line and run again."
                ) from None
            yield row


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append complete lines and flush them to the disk.

    If the file's folder has a folder `SUMS`, the digest of each line is appended to the file of that name
    in it first; see `drop_changed`.
    """
    lines = [as_line(row).encode() for row in rows]
    sums = path.parent / SUMS
    if sums.is_dir():
        with (sums / path.name).open("ab") as file:
            file.writelines(map(_digest, lines))
    with path.open("ab") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def drop_changed(path: Path) -> int:
    """Remove rows from a file of appended rows, from the first row that is not what was appended.

    Returns:
        The number of removed rows, without an incomplete last line, which a kill leaves.
    """
    sums = path.parent / SUMS / path.name
    for one in (path, sums):
        remove_unless(one, Path.is_file)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    digests = sums.read_bytes().splitlines(keepends=True) if sums.exists() else []
    same = [_digest(line) == digest for line, digest in zip(lines, digests, strict=False)]
    kept = [*same, False].index(False)
    for one, parts in ((path, lines), (sums, digests)):
        if one.exists():
            os.truncate(one, sum(map(len, parts[:kept])))
    return sum(line.endswith(b"\n") for line in lines[kept:])


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode() + b"\n"


def replace_folder(made: Path, place: Path) -> None:
    """Give the folder `made` the name `place`; a folder there is removed, or comes back if this fails."""
    if not place.exists():
        made.rename(place)
        return
    with temporary(place, folder=True) as aside:
        old = aside / "old"
        try:
            place.rename(old)
            made.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise


def remove_tree(path: Path) -> None:
    """Remove a folder, or a file or link in its place, if it exists."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def remove_unless(path: Path, expected: Callable[[Path], bool]) -> None:
    """Remove what is at `path` unless it is what is expected there: `Path.is_file` or `Path.is_dir`."""
    if os.path.lexists(path) and not expected(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
