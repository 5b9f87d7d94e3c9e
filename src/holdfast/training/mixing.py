"""Mix alignment rows into the user's rows: shared by VLGuard, SafeInstr and BEA."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed

Row = dict[str, Any]


def mix_rows(
    user_rows: Any,
    alignment_rows: Any,
    count: int,
    *,
    seed: int,
    name: str,
    replace: bool = False,
    change: Callable[[Row], Row] = lambda row: row,
) -> list[Row]:
    """Mix `count` alignment rows, drawn without repetition, into the user rows in a seeded order.

    Args:
        user_rows, alignment_rows: lists of dicts, or `datasets.Dataset`s.
        count: the number of alignment rows; with 0 the user rows are returned as they are.
        seed: seed of every draw; the rows of a smaller count are among those of a larger count.
        name: name of the method, for its seed and its errors.
        replace: remove as many user rows, drawn from those whose `source` is not "harmful" (from all rows if
            they have no `source`), so that n stays the same. If False, the alignment rows are added.
        change: applied to each drawn alignment row.

    Returns:
        A list of dicts; alignment rows have `source` "alignment".

    Raises:
        DataError: there are fewer rows to draw, or to replace, than `count`.
    """
    user, alignment = list(user_rows), list(alignment_rows)
    benign = [i for i, row in enumerate(user) if row.get("source") != "harmful"]
    if count > len(alignment):
        raise DataError(
            f"{name}: asked for {count} alignment rows, but there are {len(alignment)}. Lower alignment_size "
            "(or alignment_ratio), or give more alignment rows."
        )
    if replace and count > len(benign):
        raise DataError(
            f"{name}: cannot replace {count} benign user rows by alignment rows; there are {len(benign)}. "
            "Lower alignment_size (or alignment_ratio), or set replace to false."
        )
    if count == 0:
        return user
    replaced = set(_draw(benign, count, derive_seed(seed, name, "replaced")) if replace else ())
    kept = [row for i, row in enumerate(user) if i not in replaced]
    drawn = _draw(alignment, count, derive_seed(seed, name, "alignment"))
    mixed = kept + [{**change(row), "source": "alignment"} for row in drawn]
    return _draw(mixed, len(mixed), derive_seed(seed, name, "order"))


def check_amounts(size: Any, ratio: Any = None) -> None:
    """Raise ValueError if alignment_size is not a count or alignment_ratio is not a share."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise ValueError(f"alignment_size must be a whole number, 0 or more, found {size!r}")
    if ratio is not None and (
        isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1
    ):
        raise ValueError(f"alignment_ratio must be a share of the user rows from 0 to 1, found {ratio!r}")


def share_of(ratio: float, user_rows: Any, name: str) -> int:
    """Return the number of alignment rows that are `ratio` of the user rows.

    Raises:
        DataError: the share is above 0 but less than half a row, so that the method would change nothing.
    """
    count = round(ratio * len(user_rows))
    if ratio > 0 and count == 0:
        raise DataError(
            f"{name}: alignment_ratio={ratio:g} of {len(user_rows)} user rows is less than one row, so this "
            "would be plain fine-tuning. Set alignment_size=1 or more, or raise alignment_ratio."
        )
    return count


def _draw(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Return the first `count` items of a seeded order of `items`."""
    return random.Random(seed).sample(items, len(items))[:count]
