"""Files and folders that are whole or not there: written beside and renamed; JSONL that is appended to."""

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


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which replaces it when the block ends, and is removed if the block fails.

    A reader sees the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8; see `beside`."""
    with beside(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """`write_text` for JSON; NaN is refused, because other readers would not read it."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_text` for one JSON object a line."""
    write_text(path, as_lines(rows))


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that is appended to; a last line torn by a kill is cut off the file."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with path.open("rb+") as file:
            file.truncate(end)
    return [json.loads(line) for line in whole[:end].splitlines()]


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines and hand them to the disk."""
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
    """Remove a folder that may be absent."""
    shutil.rmtree(path, ignore_errors=True)
