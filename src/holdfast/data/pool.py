"""The rows of one source without duplicates, and seeded draws from them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from holdfast.data.rows import prompt_key, recognised, to_rows
from holdfast.data.sources import Source, read_records
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.tasks import Row, Task


@dataclass(frozen=True)
class Pool:
    """Rows, and the manifest's entry for their source.

    `taken` says how rows are taken from it: "drawn" (unique rows in a seeded order), "first" (the first rows
    of the file, in order, with duplicates) or "held out".
    """

    rows: list[Row]
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
    take: str = "drawn",
) -> Pool:
    """Read a source and drop exact duplicates (same instruction, input, output) unless `take` is "first"."""
    loaded = read_records(source, role="harmful" if role == "mixed" else role, split=split)
    rows = to_rows(loaded, role=role, task=task, kind=kind, prompts_only=prompts_only)
    unique = numbered(rows) if take == "first" else list({row["id"]: row for row in rows}.values())
    manifest = {
        "role": role,
        "source": loaded.name,
        "sha256": loaded.sha256,
        "rows": len(loaded.records),
        "licence": loaded.licence,
    }
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


def numbered(rows: Sequence[Row]) -> list[Row]:
    """The rows with different ids: the second row with an id gets the ending -2, and so on."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        seen[row["id"]] += 1
        count = seen[row["id"]]
        found.append(row if count == 1 else {**row, "id": f"{row['id']}-{count}"})
    return found


@cache
def _warn(text: str) -> None:
    """Log a warning once per process; the manifest records it too."""
    logging.getLogger("holdfast.data").warning(text)


def order(keys: Sequence[str], seed: int, name: str) -> list[str]:
    """`keys` in the seeded order of the consumer `name`, which does not depend on the input order."""
    start = derive_seed(seed, name)
    return sorted(keys, key=lambda key: hashlib.sha256(f"{start}/{key}".encode()).digest())


def draw(pool: Pool, size: int | None, seed: int, name: str, asked: str) -> list[Row]:
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
        return pool.rows[:size]
    rows = {row["id"]: row for row in pool.rows}
    return [rows[key] for key in order(list(rows), seed, name)[:size]]


def by_prompt(rows: Sequence[Row]) -> dict[str, Row]:
    """The first row of each prompt, by prompt key."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(prompt_key(row), row)
    return found


def without(pool: Pool, keys: set[str]) -> Pool:
    """The pool without the rows that have one of the prompts in `keys`."""
    rows = [row for row in pool.rows if prompt_key(row) not in keys]
    return replace(pool, rows=rows, held_out=len(pool.rows) - len(rows))
