"""Prompts that the alignment, training and test rows of a run share, but should not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.data.rows import prompt_key

EXAMPLES = 10


def overlaps(
    *,
    alignment: Iterable[Mapping[str, Any]] = (),
    harmful: Iterable[Mapping[str, Any]] = (),
    user: Iterable[Mapping[str, Any]] = (),
    test: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Count the prompts that appear in two sets that should be disjoint, ignoring case and whitespace.

    Returns:
        harmful_in_alignment, harmful_in_test: harmful training rows whose prompt is also an alignment
        prompt or a harmful test prompt. task_in_user: rows of the task's test set whose prompt is also a
        training prompt. If there are `harmful` rows of the alignment stage: alignment_harmful_in_user and
        alignment_harmful_in_test, those whose prompt is also a harmful training prompt or a harmful test
        prompt. examples: ids of up to 10 of all these rows.
    """
    known = [(row["id"], prompt_key(row)) for row in harmful]
    known_keys = {key for _, key in known}
    aligned = {prompt_key(row) for row in alignment}
    tested, wanted = set(), []
    for row in test:
        if row["set"] == "harmful":
            tested.add(prompt_key(row))
        elif row["set"] == "task":
            wanted.append((row["id"], prompt_key(row)))
    task_keys, trained, attacked = {key for _, key in wanted}, set(), set()
    in_alignment, in_test = [], []
    for row in user:  # once, and without keeping its prompts: there may be a million rows
        key = prompt_key(row)
        if row["source"] != "harmful":
            trained |= {key} & task_keys
            continue
        attacked |= {key} & known_keys
        if key in aligned:
            in_alignment.append(row["id"])
        if key in tested:
            in_test.append(row["id"])
    in_user = [name for name, key in wanted if key in trained]
    known_in_test = [name for name, key in known if key in tested]
    known_in_user = [name for name, key in known if key in attacked]
    found: dict[str, Any] = {
        "harmful_in_alignment": len(in_alignment),
        "harmful_in_test": len(in_test),
        "task_in_user": len(in_user),
    }
    if known:
        found["alignment_harmful_in_user"] = len(known_in_user)
        found["alignment_harmful_in_test"] = len(known_in_test)
    names = in_test + known_in_test + in_alignment + in_user + known_in_user
    return {**found, "examples": list(dict.fromkeys(names))[:EXAMPLES]}
