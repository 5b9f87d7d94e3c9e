"""The rows of one source without duplicates, and seeded draws from them. The rows are kept on the disk."""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from holdfast.data.bad_rows import BadRows
from holdfast.data.files import Placed
from holdfast.data.rows import convert, finished, prompt_key, recognised
from holdfast.data.sources import Loaded, Source, read_records
from holdfast.data.stored import StoredRows
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.tasks import Row, Task


@dataclass(frozen=True)
class Pool:
    """Rows, and the manifest's entry for their source.

    `taken` says how rows are taken from it: "drawn" (unique rows in a seeded order), "first" (the first rows
    of the file, in order, with duplicates) or "held out".
    """

    rows: StoredRows
    source: dict[str, Any]
    duplicates: int = 0
    held_out: int = 0
    prompts: str = "unknown"  # of a harmful source: "unsafe-only", "mixed" or "unknown"
    taken: str = "drawn"


def read_pool(
    source: Source,
    *,
    role: str,
    split: str = "train",
    task: str | Task | None = None,
    kind: str | None = None,
    prompts_only: bool = False,
    skip_bad: bool = False,
    take: str = "drawn",
) -> Pool:
    """Read a source and drop exact duplicates (same instruction, input and output).

    Args:
        take: "first" keeps the duplicates.
        skip_bad: leave out rows that cannot be used; the manifest counts them, and a warning says how many.
    """
    loaded = read_records(source, role="harmful" if role == "mixed" else role, split=split)
    bad, total = BadRows(loaded.path), Counted(loaded)
    found = convert(
        replace(loaded, read=total.records), bad, role=role, task=task, kind=kind, prompts_only=prompts_only
    )
    rows = StoredRows.write((one.row, prompt_key(one.row)) for one in finished(found, bad, skip_bad))
    unique = rows if take == "first" else rows.unique()
    manifest = {
        "role": role,
        "source": loaded.name,
        "sha256": loaded.sha256,
        "rows": total.count,
        "licence": loaded.licence,
    }
    if bad.count:
        manifest["bad_rows_dropped"] = bad.count
        manifest["first_bad_rows"] = bad.places()
        _warn(f"{loaded.name}: {bad.count:,} of {total.count:,} rows cannot be used and are dropped.")
    known, warning = recognised(loaded, role), loaded.warning
    if loaded.known is not None:
        manifest["data_set"] = loaded.known.stamp
        if warning:
            _warn(f"{loaded.known.name} {warning}. Licence: {loaded.licence or 'not known'}.")
    elif known is not None and known.warning:
        warning = f"in the format of {known.name}, which {known.warning}"
        _warn(f"{loaded.name} is {warning}. Licence of {known.name}: {known.licence}.")
    if warning:
        manifest["warning"] = warning
    prompts = "unknown"
    if known is not None:
        prompts = "mixed" if role == "mixed" and "safe" in known.kinds else "unsafe-only"
    return Pool(unique, manifest, duplicates=len(rows) - len(unique), prompts=prompts, taken=take)


def numbered(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with different ids: the second row with an id gets the ending -2, and so on."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row["id"]] += 1
        count = seen[row["id"]]
        yield row if count == 1 else {**row, "id": f"{row['id']}-{count}"}


@cache
def _warn(text: str) -> None:
    """Log a warning once per process; the manifest records it too."""
    logging.getLogger("holdfast.data").warning(text)


class Counted:
    """Counts the records of a source while they are read."""

    def __init__(self, loaded: Loaded):
        self._loaded, self.count = loaded, 0

    def records(self) -> Iterator[Placed]:
        """Yield the records; `count` is their number afterwards."""
        for self.count, placed in enumerate(self._loaded, 1):  # noqa: B020
            yield placed


def digest(start: int, key: str) -> bytes:
    """Return the place of a key in a seeded order, as bytes that sort."""
    return hashlib.sha256(f"{start}/{key}".encode()).digest()


def order(keys: Sequence[str], seed: int, name: str) -> list[str]:
    """`keys` in the seeded order of the consumer `name`, which does not depend on the input order."""
    start = derive_seed(seed, name)
    return sorted(keys, key=lambda key: digest(start, key))


def first_prompts(rows: StoredRows, size: int, seed: int, name: str) -> list[str]:
    """The keys of the first `size` prompts in the seeded order of the consumer `name`."""
    start = derive_seed(seed, name)
    keys = (prompt_key(row) for row in rows.one_of_each_prompt())
    first = heapq.nsmallest(size, ((digest(start, key), key) for key in keys))
    return [key for _, key in first]


def draw(pool: Pool, size: int | None, seed: int, name: str, asked: str) -> StoredRows:
    """The first `size` rows of the seeded order or of the file, or all of them.

    Raises:
        DataError: there are fewer rows; the message has both numbers.
    """
    if size is not None and size > len(pool.rows):
        counts = {"duplicates dropped": pool.duplicates, "held out for the test": pool.held_out}
        less = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        raise DataError(
            f"Asked for {size} {asked}, but {pool.source['source']} has {len(pool.rows)}"
            f"{f' ({less})' if less else ''}. Ask for fewer rows, or give more."
        )
    if pool.taken == "first":
        return pool.rows.pick(range(len(pool.rows))[:size])
    start = derive_seed(seed, name)
    digests = np.fromiter(
        (int.from_bytes(digest(start, key)[:8], "big") for key in pool.rows.ids), np.uint64, len(pool.rows)
    )
    return pool.rows.pick(np.argsort(digests, kind="stable")[:size])


def without(pool: Pool, keys: Collection[str]) -> Pool:
    """The pool without the rows that have one of the prompts in `keys`."""
    rows = pool.rows.without_prompts(keys)
    return replace(pool, rows=rows, held_out=len(pool.rows) - len(rows))
