"""Find the file and line of rows, for the messages about rows that cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from holdfast.data.bad_rows import BadRows
from holdfast.data.rows import convert, row_id
from holdfast.data.sources import Source, has_split, read_records
from holdfast.errors import DataError
from holdfast.tasks import Row, Task


def places_of(
    wanted: Iterable[str],
    sources: Iterable[tuple[Source, str]],
    *,
    task: Task | None = None,
    kind: str | None = None,
) -> dict[str, str]:
    """Return the place ("my.jsonl, line 3") of rows, by their id; rows that are not found are left out.

    Args:
        wanted: ids of rows.
        sources: the data sets that may hold them, each with its role.
        task: the task whose columns the user's files may have.
        kind: the kind of rows that was taken from a safety data set.
    """
    ends: Mapping[str, str] = {one.rpartition("-")[2]: one for one in wanted}
    found: dict[str, str] = {}
    for source, role in sources:
        for split in ("train", "test"):
            if len(found) == len(ends):
                return found
            for row, place in _placed(source, role, split, task, kind):
                for end in (row_id("", row)[1:], row_id("", {**row, "output": ""})[1:]):
                    if end in ends:
                        found.setdefault(ends[end], place)
    return found


def _placed(
    source: Source, role: str, split: str, task: Task | None, kind: str | None
) -> Iterable[tuple[Row, str]]:
    try:
        if split != "train" and not has_split(source, split, role=role):
            return
        loaded = read_records(source, role=role, split=split)
    except DataError:
        return
    for wanted in dict.fromkeys([kind, None]):
        with contextlib.suppress(DataError):
            found = convert(
                loaded, BadRows(loaded.path), role=role, kind=wanted, prompts_only=True,
                task=task if role == "user" else None,
            )  # fmt: skip
            yield from ((one.row, f"{loaded.path}, {one.place}") for one in found)
