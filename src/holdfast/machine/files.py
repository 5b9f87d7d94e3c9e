"""Files and folders written atomically (a temporary one is renamed), and JSONL files that are appended to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import DataError


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it when the block ends; it is removed on an error.

    A reader sees either the old file or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode(0o666))
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def mode(asked: int) -> int:
    """Return the permissions of a new file (0o666) or folder (0o777) under the umask of this process."""
    umask = os.umask(0o077)
    os.umask(umask)
    return asked & ~umask


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8; see `beside`."""
    with beside(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """`write_text` for JSON. NaN is refused, because it is not valid JSON."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_text` for one JSON object per line; only one row is in memory."""
    with beside(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
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
    """Read the value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


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
    """Append complete lines and flush them to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(as_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def replace_folder(made: Path, place: Path) -> None:
    """Give the folder `made` the name `place`; a folder there is removed, or comes back if this fails."""
    if not place.exists():
        made.rename(place)
        return
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        old = Path(temporary) / "old"
        try:
            place.rename(old)
            made.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise


def remove_tree(path: Path) -> None:
    """Remove a folder if it exists."""
    shutil.rmtree(path, ignore_errors=True)
