"""Alignment rows among the user's: what VLGuard, SafeInstr and BEA share."""

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
    """`count` alignment rows, drawn without repetition, among the user rows, in a seeded order.

    Args:
        user_rows, alignment_rows: lists of dicts, or `datasets.Dataset`s.
        count: how many alignment rows; with 0 the user rows come back as they are.
        seed: of every draw here; the rows of a smaller count are among those of a larger one.
        name: of the method, for its seed and its errors.
        replace: as many user rows go, drawn from those whose `source` is not "harmful" (from all rows where
            rows do not say so), so that n stays; else the alignment rows are added.
        change: applied to each alignment row that was drawn.

    Returns:
        a list of dicts; alignment rows have `source` "alignment".

    Raises:
        DataError: more rows wanted than there are to draw, or to replace.
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
            f"{name}: {count} alignment rows were to replace benign user rows, but there are {len(benign)}. "
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
    """Raise ValueError for an alignment_size or alignment_ratio that is no count or no share."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise ValueError(f"alignment_size must be a whole number from 0 on, found {size!r}")
    if ratio is not None and (
        isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1
    ):
        raise ValueError(f"alignment_ratio must be a share of the user rows from 0 to 1, found {ratio!r}")


def _draw(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """The first `count` of a seeded order of `items`."""
    return random.Random(seed).sample(items, len(items))[:count]
