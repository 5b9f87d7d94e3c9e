"""Rows in a temporary file. Only their ids, the hashes of their prompts and their places are in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from holdfast.errors import HoldfastError
from holdfast.tasks import Row

IN_MEMORY = 2**24
"""Number of bytes of rows above which the temporary file is on the disk."""


def prompt_hash(key: str) -> int:
    """Return 64 bits of the SHA-256 of a prompt key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class StoredRows(Sequence[Row]):
    """A sequence of rows, each read from a file when it is needed; it takes 32 bytes of memory for each.

    An id is the role and 12 hex digits, as `rows.row_id` makes it.
    """

    def __init__(self, files: Sequence[_File], columns: np.ndarray):
        self._files = files
        self._columns = columns  # file, offset, id, prompt: uint64 [4, N]

    @classmethod
    def write(cls, rows: Iterable[tuple[Row, str]]) -> StoredRows:
        """Store rows, each given with the key of its prompt.

        Raises:
            HoldfastError: the disk is full.
        """
        file = _File(tempfile.SpooledTemporaryFile(IN_MEMORY), {})  # noqa: SIM115 (open as long as the rows)
        found: list[np.ndarray] = []
        part: list[tuple[int, int, int, int]] = []
        place = 0
        for row, key in rows:
            line = json.dumps(row).encode() + b"\n"
            _write(file.stream, line)
            file.role, _, digits = row["id"].rpartition("-")
            part.append((0, place, int(digits, 16), prompt_hash(key)))
            place += len(line)
            if len(part) == 10_000:
                found.append(np.array(part, dtype=np.uint64).T)
                part = []
        found.append(np.array(part, dtype=np.uint64).reshape(-1, 4).T)
        return cls([file], np.concatenate(found, axis=1))

    @classmethod
    def joined(cls, parts: Sequence[StoredRows]) -> StoredRows:
        """Return the rows of all parts, in order."""
        files: list[_File] = []
        columns = [np.zeros((4, 0), dtype=np.uint64)]
        for part in parts:
            shifted = part._columns.copy()
            shifted[0] += np.uint64(len(files))
            columns.append(shifted)
            files += part._files
        return cls(files, np.concatenate(columns, axis=1))

    def labelled(self, source: str) -> StoredRows:
        """Return the rows with `source` in each."""
        files = [_File(file.stream, {**file.further, "source": source}, file.role) for file in self._files]
        return StoredRows(files, self._columns)

    def pick(self, places: Any) -> StoredRows:
        """Return the rows at `places`, in their order."""
        return StoredRows(self._files, self._columns[:, np.asarray(places, dtype=np.int64)])

    @property
    def ids(self) -> Iterator[str]:
        """The id of each row."""
        for start in range(0, len(self), 10_000):
            part = self._columns[:, start : start + 10_000]
            for file, digits in zip(part[0].tolist(), part[2].tolist(), strict=True):
                yield f"{self._files[file].role}-{digits:012x}"

    def unique(self) -> StoredRows:
        """Return one row for each id: at the place of the first, with the content of the last."""
        _, first = np.unique(self._columns[2], return_index=True)
        _, last = np.unique(self._columns[2][::-1], return_index=True)
        last = len(self) - 1 - last
        by_place = np.argsort(first)
        return self.pick(last[by_place])

    def one_of_each_prompt(self) -> StoredRows:
        """Return the first row of each prompt."""
        _, first = np.unique(self._columns[3], return_index=True)
        return self.pick(np.sort(first))

    def with_prompts(self, keys: Iterable[str]) -> StoredRows:
        """Return the rows that have one of these prompts."""
        return self.pick(np.flatnonzero(self._with(keys)))

    def without_prompts(self, keys: Iterable[str]) -> StoredRows:
        """Return the rows that have none of these prompts."""
        return self.pick(np.flatnonzero(~self._with(keys)))

    def _with(self, keys: Iterable[str]) -> np.ndarray:
        hashes = np.array([prompt_hash(key) for key in keys], dtype=np.uint64)
        return np.asarray(np.isin(self._columns[3], hashes))

    def __len__(self) -> int:
        return int(self._columns.shape[1])

    def __iter__(self) -> Iterator[Row]:
        for i in range(len(self)):
            yield self._read(i)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self._read(one) for one in range(*i.indices(len(self)))]
        return self._read(range(len(self))[i])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _read(self, i: int) -> Row:
        file = self._files[int(self._columns[0, i])]
        file.stream.seek(int(self._columns[1, i]))
        return {**json.loads(file.stream.readline()), **file.further}


def _write(stream: Any, line: bytes) -> None:
    try:
        stream.write(line)
    except OSError as error:
        place = tempfile.gettempdir()
        raise HoldfastError(
            f"The rows cannot be kept in {place}: {error.strerror or error}. Free some space there, or set "
            "TMPDIR to another folder."
        ) from error


class _File:
    """The file of some rows, what is added to each, and the role in their ids."""

    def __init__(self, stream: Any, further: dict[str, Any], role: str = ""):
        self.stream, self.further, self.role = stream, further, role
