"""SHA-256 of files, computed once per file: large ones are cached by path, size, mtime and inode.

Records list files with their sizes and digests, and can be sealed, so that damage to either is noticed. This
is no protection against somebody who changes both the files and the record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from holdfast.machine.files import read_json, write_json

LARGE = 2**20
"""Files of at least this many bytes are cached; hashing smaller ones again takes hardly any time."""

SETTLED = 2.0
"""A file is cached only if its last change is this many seconds ago. A file that changes twice within the
resolution of its mtime would otherwise keep the first digest."""

SEAL = "record_sha256"
"""The key of a sealed record's own digest."""


class Digests:
    """Digests of files, kept in a JSON file if `path` is given.

    Args:
        path: the file to read, and to write unless `read_only`.
        read_only: use the digests in the file without writing new ones.
        large: files of at least this many bytes are cached.
        settled: seconds since a file's last change after which it is cached.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        read_only: bool = False,
        large: int = LARGE,
        settled: float = SETTLED,
    ):
        self.path, self.read_only = path, read_only
        self.large, self.settled = large, settled
        self._known: dict[str, list[int | str]] = self._read()

    def of(self, file: Path) -> str:
        """The SHA-256 of the whole file, 64 hex digits."""
        file = file.resolve()
        found = file.stat()
        key = [found.st_size, found.st_mtime_ns, found.st_ino]
        known = self._known.get(str(file))
        if known is not None and known[:3] == key:
            return str(known[3])
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if found.st_size >= self.large and time.time() - found.st_mtime > self.settled:
            self._known[str(file)] = [*key, digest]
            self._write()
        return digest

    def _read(self) -> dict[str, list[int | str]]:
        """Return the digests in the file; none if it is damaged, so that every digest is computed again."""
        try:
            known = read_json(self.path) if self.path and self.path.is_file() else {}
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {file: entry for file, entry in known.items() if isinstance(entry, list) and len(entry) == 4}

    def _write(self) -> None:
        if self.path is not None and not self.read_only:
            with contextlib.suppress(OSError):  # it only saves time
                write_json(self.path, {**self._read(), **self._known})


def describe(
    files: Iterable[Path], folder: Path, digests: Digests | None = None
) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files, by their names relative to `folder`."""
    digests = digests or Digests()
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digests.of(file)}
        for file in sorted(files)
    }


def changed(
    described: Mapping[str, Mapping[str, Any]], folder: Path, digests: Digests | None = None
) -> list[str]:
    """Return the names of files that are missing or differ from what `describe` returned.

    Raises:
        TypeError, LookupError, AttributeError: `described` is not what `describe` returns.
    """
    digests, found = digests or Digests(), []
    for name, told in described.items():
        size, digest = told["bytes"], told["sha256"]
        try:
            state = (folder / name).stat()
            same = S_ISREG(state.st_mode) and state.st_size == size and digests.of(folder / name) == digest
        except (OSError, ValueError):
            same = False
        if not same:
            found.append(name)
    return found


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return `record` with `record_sha256`, the digest of its values."""
    values = {key: value for key, value in record.items() if key != SEAL}
    return {**values, SEAL: _digest(values)}


def intact(record: Any) -> bool:
    """Whether `record` is a sealed record whose values have not changed."""
    return isinstance(record, dict) and SEAL in record and sealed(record)[SEAL] == record[SEAL]


def _digest(values: Mapping[str, Any]) -> str:
    # As read from a JSON file: lists for tuples, text for keys.
    plain = json.loads(json.dumps(values, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
