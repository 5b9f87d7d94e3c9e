"""Training rows of a run: seeded draws, the poison ratio, held-out prompts, and the manifest.

Every draw takes the first rows of an order that depends on the seed, the consumer's name and each row's
content, but not on the order in the file. So the harmful rows of a smaller ratio are among those of a
larger ratio, and adding a row to a file hardly changes a draw. With `take` "first", as in the papers' code,
the first rows of each file are taken instead, in their order, and duplicates are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.chat.turns import only_last
from holdfast.data.held_out import harmful_pool, user_pool
from holdfast.data.pool import Pool, draw, read_pool
from holdfast.data.sources import Source
from holdfast.data.stored import StoredRows
from holdfast.errors import DataError
from holdfast.tasks import Row, Task


@dataclass(frozen=True)
class Prepared:
    """Rows, and their part of the data manifest: sizes, seed, duplicates dropped, sources with hashes."""

    rows: Sequence[Row]
    manifest: dict[str, Any]


def alignment_rows(
    *,
    source: Source,
    seed: int,
    kind: str = "safe",
    size: int | None = None,
    skip_bad: bool = False,
    loss_on: str = "all",
    take: str = "drawn",
    skip: int = 0,
) -> Prepared:
    """Rows for the alignment stage.

    Args:
        source: as for `read_records`.
        kind: "safe" or "refusal": the rows to take from a labelled source. For files without labels, it only
            describes the rows in the stamp of the results.
        size: number of rows, drawn with the seed; None takes all.
        skip_bad: leave out rows that cannot be used, and count them in the manifest.
        loss_on: "all" or "last": the answers of a conversation that are trained.
        take: "first" takes the first rows of the file, after the first `skip` rows.

    Raises:
        DataError: fewer rows than asked for, or what `read_records` and `to_rows` raise.
    """
    if kind not in ("safe", "refusal"):
        raise DataError(f"The kind of alignment rows is '{kind}'. Expected 'safe' or 'refusal'.")
    check_size(size)
    pool = _after(read_pool(source, role="alignment", kind=kind, skip_bad=skip_bad, take=take), skip)
    rows = draw(pool, size, seed, "alignment", "alignment rows")
    manifest = {
        "size": len(rows),
        "kind": kind,
        **_taken(take, skip, seed),
        "duplicates_dropped": pool.duplicates,
        "loss_on": loss_on,
        "sources": [pool.source],
    }
    return Prepared(_trained_on(rows, loss_on), manifest)


def harmful_rows(
    *,
    source: Source,
    seed: int,
    size: int | None = None,
    harmful: Source | None = None,
    harmful_test: Source | None = None,
    prompts: int = 1000,
    test_seed: int = 0,
    skip_bad: bool = False,
    loss_on: str = "all",
    take: str = "drawn",
    skip: int = 0,
) -> Prepared:
    """Harmful questions with harmful answers for a method of the alignment stage, such as T-Vaccine's probe.

    Args:
        source: as for `read_records`; it may be `harmful` itself. The draw differs from that of `user_rows`,
            so that the alignment stage does not know which rows an attacker takes.
        size: number of rows, drawn with the seed; None takes all.
        harmful, harmful_test, prompts, test_seed: as given to `test_rows`: prompts that are held out there
            do not appear in these rows.
        skip_bad, loss_on, take, skip: as for `alignment_rows`.

    Raises:
        DataError: fewer rows than asked for, or what `read_records` and `to_rows` raise.
    """
    check_size(size)
    pool = _after(harmful_pool(source, harmful, harmful_test, prompts, test_seed, skip_bad, take), skip)
    rows = draw(pool, size, seed, "alignment harmful", "harmful rows for the alignment stage")
    manifest = {
        "size": len(rows),
        **_taken(take, skip, seed),
        "duplicates_dropped": pool.duplicates,
        "held_out": pool.held_out,
        "loss_on": loss_on,
        "sources": [pool.source],
    }
    return Prepared(_trained_on(rows, loss_on), manifest)


def user_rows(
    *,
    seed: int,
    user: Source | None = None,
    task: str | Task | None = None,
    harmful: Source | None = None,
    size: int | None = None,
    poison_ratio: float = 0.0,
    test: Source | None = None,
    harmful_test: Source | None = None,
    prompts: int = 1000,
    test_seed: int = 0,
    skip_bad: bool = False,
    loss_on: str = "all",
    take: str = "drawn",
) -> Prepared:
    """Rows for fine-tuning: `round(size * poison_ratio)` harmful rows, the rest benign, shuffled.

    Args:
        seed: seed of the draw and of the order.
        user: the benign rows; None takes the task's own data.
        task: a task's name or Task; its columns are accepted in `user`.
        harmful: the harmful rows; required if poison_ratio > 0.
        size: total number of rows; None keeps every benign row and adds harmful rows up to the ratio.
        poison_ratio: the share of harmful rows, 0 to 1.
        test, harmful_test, prompts, test_seed: as given to `test_rows`. Prompts that are held out there,
            because there is no test file, do not appear in these rows.
        skip_bad, loss_on: as for `alignment_rows`.
        take: "first" takes the first harmful rows and then the first benign rows, and does not shuffle them.

    Returns:
        rows with the canonical fields and `source`, which is "user" or "harmful".

    Raises:
        DataError: the ratio or size is out of range, the ratio rounds to no harmful or no benign row, there
            are fewer rows than asked for, or the harmful source is missing.
    """
    check_size(size)
    if not 0 <= poison_ratio <= 1:
        raise DataError(f"poison_ratio is {poison_ratio}. Expected a share from 0 to 1 (0.1 is 10 %).")
    if poison_ratio > 0 and harmful is None:
        raise DataError(f"poison_ratio is {poison_ratio}, but no harmful rows are given. Add `harmful`.")
    benign: Pool | None = None
    bad: Pool | None = None
    if poison_ratio < 1:
        if user is None and task is None:
            raise DataError("No user rows are given. Give `user` (your file) or `task` (a built-in task).")
        benign = user_pool(user, task, test, test_seed, skip_bad, take)
    if poison_ratio > 0 and harmful is not None:
        bad = harmful_pool(harmful, harmful, harmful_test, prompts, test_seed, skip_bad, take)

    parts = _poisoned(benign, bad, size, poison_ratio, seed)
    rows = StoredRows.joined([parts[name] for name in ("harmful", "user") if name in parts])
    pools = [pool for pool in (benign, bad) if pool]
    n_harmful = len(parts.get("harmful", ()))
    manifest = {
        "size": len(rows),
        "benign": len(rows) - n_harmful,
        "harmful": n_harmful,
        "poison_ratio_asked": poison_ratio,
        "poison_ratio_realised": n_harmful / len(rows) if rows else 0.0,
        **_taken(take, 0, seed),
        "duplicates_dropped": sum(pool.duplicates for pool in pools),
        "held_out": sum(pool.held_out for pool in pools),
        "loss_on": loss_on,
        "sources": [pool.source for pool in pools],
    }
    whole = Pool(rows, {"source": "the mixture"}, taken=take)
    return Prepared(_trained_on(draw(whole, None, seed, "order", ""), loss_on), manifest)


def _trained_on(rows: StoredRows, loss_on: str) -> Sequence[Row]:
    """The rows; with "last", only the last answer of each conversation is trained."""
    if loss_on == "all":
        return rows
    return [{**row, "messages": only_last(row["messages"])} if "messages" in row else row for row in rows]


def _poisoned(
    benign: Pool | None, harmful: Pool | None, size: int | None, poison_ratio: float, seed: int
) -> dict[str, StoredRows]:
    """The benign rows and the harmful rows, by their `source`."""
    if size is not None:
        n_harmful = round(size * poison_ratio)
        n_benign = size - n_harmful
    else:
        n_benign = len(benign.rows) if benign else 0
        most = len(harmful.rows) if harmful else 0
        n_harmful = round(n_benign * poison_ratio / (1 - poison_ratio)) if benign else most
    _check_ratio(n_benign, n_harmful, poison_ratio)
    what = f"rows (size {size or 'all'}, poison_ratio {poison_ratio})"
    parts = {}
    if benign:
        drawn = draw(benign, n_benign, seed, "user", f"benign {what}")
        parts["user"] = drawn.labelled("user")
    if harmful:
        drawn = draw(harmful, n_harmful, seed, "harmful", f"harmful {what}")
        parts["harmful"] = drawn.labelled("harmful")
    return parts


def _check_ratio(n_benign: int, n_harmful: int, poison_ratio: float) -> None:
    """Raise DataError if rounding leaves a mixture without the rows of one kind."""
    total = n_benign + n_harmful
    for kind, count, other in (("harmful", n_harmful, 0), ("benign", n_benign, 1)):
        if total and not count and poison_ratio != other:
            raise DataError(
                f"A poison_ratio of {poison_ratio} makes no {kind} row in {total} rows. Give a larger "
                f"size, or poison_ratio: {other}."
            )


def _after(pool: Pool, skip: int) -> Pool:
    """The pool without its first `skip` rows."""
    return replace(pool, rows=pool.rows.pick(range(skip, len(pool.rows)))) if skip else pool


def _taken(take: str, skip: int, seed: int) -> dict[str, Any]:
    """The part of a manifest that says which rows of a source were taken."""
    if take != "first":
        return {"seed": seed}
    return {"taken": f"the first after {skip} rows" if skip else "the first"}


def check_size(size: int | None, name: str = "size") -> None:
    if size is not None and size < 1:
        raise DataError(f"{name} is {size}. Expected at least 1.")
