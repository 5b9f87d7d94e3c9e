"""Test rows of a run: harmful prompts, rows of the task, benign questions, and the identity of each set."""

# ruff: noqa: PT028 (`test_rows` makes test rows; it is not a test)

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from holdfast.data.held_out import benign_prompts, harmful_prompts, task_test
from holdfast.data.pool import Pool, numbered
from holdfast.data.prepare import Prepared, check_size
from holdfast.data.rows import prompt_key, row_id
from holdfast.data.sources import Source
from holdfast.tasks import Row, Task


def test_rows(
    *,
    user: Source | None = None,
    task: str | Task | None = None,
    harmful: Source | None = None,
    test: Source | None = None,
    harmful_test: Source | None = None,
    benign: Source | None = None,
    prompts: int = 1000,
    task_size: int | None = None,
    mixed_prompts: bool = False,
    test_seed: int = 0,
    skip_bad: bool = False,
    take: str = "drawn",
) -> Prepared:
    """The test rows of a run: harmful prompts, rows of the task, benign questions.

    Args:
        user, task, harmful: as given to `user_rows`. A source with splits gives its test split. A single file
            gives a held-out share: `user` 10 % of its prompts (at most 1000), `harmful` up to `prompts`, but
            at most 20 % of its prompts.
        test, harmful_test, benign: files or data set names for the three sets. If `test` is a task's name,
            that task grades the answers. The harmful and benign sets need no answers. The embedded world has
            its own benign questions.
        prompts: maximum number of harmful prompts, and of benign prompts.
        task_size: maximum number of rows of the task; None takes the task's default.
        mixed_prompts: also take the prompts of safe answers, as the Lisa paper does.
        test_seed: seed of every draw here. It is separate from the seed of a run, so that runs with different
            seeds are measured on the same prompts and can be compared.
        skip_bad: leave out rows that cannot be used, and count them in the manifest.
        take: "first" takes the first harmful rows and the first rows of the task, as in the papers' code: in
            the order of the file, and with duplicates. It does not apply to rows that are held out.

    Returns:
        rows with id, set ("harmful", "task" or "benign"), instruction, input, target (None for harmful
        prompts), category, and, if the row has them, messages (a conversation of several turns), turns and
        reference (see `holdfast.tasks`). The manifest holds
        "prompts" ("unsafe-only", "mixed" or "unknown") and 12 hex digits for the harmful and task sets.
    """
    check_size(prompts, "prompts")
    check_size(task_size, "task_size")
    sets: dict[str, Pool] = {}
    if harmful is not None or harmful_test is not None:
        sets["harmful"] = harmful_prompts(
            harmful, harmful_test, prompts, test_seed, mixed_prompts, skip_bad, take
        )
    if user is not None or task is not None or test is not None:
        sets["task"] = task_test(user, task, test, task_size, test_seed, skip_bad, take)
    found = benign_prompts(benign, harmful_test or harmful, prompts, test_seed, skip_bad)
    if found:
        sets["benign"] = found
    rows = list(numbered(_test_row(name, row) for name, pool in sets.items() for row in pool.rows))
    harmful_set = sets.get("harmful")
    manifest = {
        **{name: len(sets[name].rows) if name in sets else 0 for name in ("harmful", "task", "benign")},
        "prompts": harmful_set.prompts if harmful_set else "unknown",
        "prompt_set": _set_id(row for row in rows if row["set"] == "harmful"),
        "task_set": _set_id(row for row in rows if row["set"] == "task"),
        "test_seed": test_seed,
        "taken": {name: pool.taken for name, pool in sets.items()},
        "sources": [pool.source for pool in sets.values()],
    }
    return Prepared(rows, manifest)


def _test_row(name: str, row: Row) -> Row:
    # The answer to a harmful prompt is not a target, and the id of a prompt does not depend on the answer.
    blank = {**row, "output": ""} if name == "harmful" else row
    further: tuple[str, ...] = ("messages", "tools", "turns", "reference")
    return {
        "id": row_id(name, blank),
        "set": name,
        "instruction": row["instruction"],
        "input": row["input"],
        "target": blank["output"] or None,
        "category": row.get("category", []),
        **{key: row[key] for key in further if key in row},
    }


def _set_id(rows: Iterable[Row]) -> str | None:
    """12 hex digits that are equal for equal sets of prompts and targets; None if there are no rows."""
    texts = sorted(json.dumps([prompt_key(row), row["target"]]) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12] if texts else None
