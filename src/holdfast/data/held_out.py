"""Divide the rows of each source into training rows and test rows.

A source with splits has its own test rows. A user's single file has none, so a share of its prompts is
held out. One function chooses the held-out prompts for both parts, so that they cannot overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdfast.data.pool import Pool, draw, first_prompts, read_pool, without
from holdfast.data.rows import prompt_key, resolve_task
from holdfast.data.sources import Source, has_split, named
from holdfast.errors import DataError
from holdfast.tasks import SafetyData, Task, own

USER_SHARE, USER_MOST = 0.1, 1000
HARMFUL_SHARE = 0.2


def user_source(user: Source | None, task: str | Task | None) -> tuple[Source | None, Task]:
    """The source of the user rows, and their task."""
    known = resolve_task(task)
    meant = named(user)
    if isinstance(meant, Task):
        known = known or meant
    return (known if user is None else user), known or own.TASK


def grading_task(user: Source | None, task: str | Task | None, test: Source | None = None) -> Task:
    """The task that grades the answers: the one that `test` names, else the task of the user rows."""
    meant = named(test)
    return meant if isinstance(meant, Task) else user_source(user, task)[1]


def user_pool(
    user: Source | None,
    task: str | Task | None,
    test: Source | None,
    seed: int,
    skip_bad: bool = False,
    take: str = "drawn",
) -> Pool:
    """The user rows for training."""
    source, known = user_source(user, task)
    assert source is not None
    pool = read_pool(source, role="user", task=known, skip_bad=skip_bad, take=take)
    if test is None and not has_split(source, "test"):
        pool = without(pool, _held(pool, USER_SHARE, USER_MOST, seed, "user test", "data.test"))
    return pool


def task_test(
    user: Source | None,
    task: str | Task | None,
    test: Source | None,
    size: int | None,
    seed: int,
    skip_bad: bool = False,
    take: str = "drawn",
) -> Pool:
    """The test rows of the task: from `test`, from the test split, or held out."""
    source, _ = user_source(user, task)
    known = grading_task(user, task, test)
    if test is not None:
        source = test
    assert source is not None
    same: dict[str, Any] = {"role": "task", "task": known, "skip_bad": skip_bad}
    if has_split(source, "test"):
        pool = read_pool(source, split="test", prompts_only=known.prompts_only, take=take, **same)
    elif test is not None:
        pool = read_pool(source, prompts_only=known.prompts_only, take=take, **same)
    else:
        pool = read_pool(source, **same)
        pool = _only(pool, _held(pool, USER_SHARE, USER_MOST, seed, "user test", "data.test"))
    return _at_most(pool, size or known.test_size, seed, "task")


def harmful_pool(
    source: Source,
    harmful: Source | None,
    harmful_test: Source | None,
    prompts: int,
    seed: int,
    skip_bad: bool = False,
    take: str = "drawn",
) -> Pool:
    """The rows of `source` for training, without the prompts that are held out of `harmful` for the test."""
    pool = read_pool(source, role="harmful", skip_bad=skip_bad, take=take)
    if harmful is not None and holds_out(harmful, harmful_test):
        asked = pool if harmful == source else read_pool(harmful, role="harmful", skip_bad=skip_bad)
        keys = _held(asked, HARMFUL_SHARE, prompts, seed, "harmful test", "data.test_harmful")
        pool = without(pool, keys)
    return pool


def holds_out(harmful: Source, harmful_test: Source | None) -> bool:
    """Whether the harmful test prompts are held out of `harmful`, because there are no other test rows."""
    return harmful_test is None and not has_split(harmful, "test", role="harmful")


def harmful_prompts(
    harmful: Source | None,
    harmful_test: Source | None,
    prompts: int,
    seed: int,
    mixed: bool,
    skip_bad: bool = False,
    take: str = "drawn",
) -> Pool:
    """The harmful test prompts: one row for each, or with `take` "first" one for each row of the file."""
    source = harmful if harmful_test is None else harmful_test
    assert source is not None
    known = named(source)
    if isinstance(known, SafetyData) and not (known.harmful_prompts and "unsafe" in known.kinds):
        raise DataError(
            f"{known.name} has no harmful prompts, so no harmful score can be measured on it. Give "
            "a data set of harmful prompts, for example hex_phi or beavertails (in a recipe: "
            "`data.test_harmful`)."
        )
    role = "mixed" if mixed else "harmful"
    how: dict[str, Any] = {"role": role, "prompts_only": True, "skip_bad": skip_bad, "take": take}
    if has_split(source, "test", role="harmful"):
        pool = read_pool(source, split="test", **how)
    elif harmful_test is not None:
        pool = read_pool(source, **how)
    elif mixed:
        raise DataError(
            f"Mixed prompts were requested, but {source} has no test split. Give a test file for them."
        )
    else:
        pool = read_pool(source, role="harmful", skip_bad=skip_bad)
        return _only(pool, _held(pool, HARMFUL_SHARE, prompts, seed, "harmful test", "data.test_harmful"))
    if take != "first":
        pool = replace(pool, rows=pool.rows.one_of_each_prompt())
    return _at_most(pool, prompts, seed, "prompts")


def benign_prompts(
    benign: Source | None, harmful: Source | None, prompts: int, seed: int, skip_bad: bool = False
) -> Pool | None:
    """One row for each benign question, or None if there are no benign questions."""
    if benign is None and harmful != "world":
        return None
    source = "world" if benign is None else benign
    known = named(source)
    if isinstance(known, SafetyData) and "benign" not in known.kinds:
        raise DataError(
            f"{known.name} has no harmless questions, so no over-refusal can be measured on it. Give a "
            "data set of harmless questions, for example xstest or or_bench (in a recipe: `data.benign`; on "
            "the command line: --benign)."
        )
    split = "test" if has_split(source, "test", role="benign") else "train"
    pool = read_pool(source, role="benign", split=split, prompts_only=True, skip_bad=skip_bad)
    return _at_most(replace(pool, rows=pool.rows.one_of_each_prompt()), prompts, seed, "benign")


OPTIONS = {"data.test": "--test", "data.test_harmful": "--test-harmful"}
"""The options of `holdfast mix` for keys of a recipe."""


def _held(pool: Pool, share: float, most: int, seed: int, name: str, key: str) -> list[str]:
    """The prompts to hold out: `share` of the unique prompts, at least 1 and at most `most`."""
    unique = len(pool.rows.one_of_each_prompt())
    if unique < 2:
        raise DataError(
            f"{pool.source['source']} has only {unique} prompt, so none can be held out for the test. "
            f"Give more rows, or a test file (in a recipe: `{key}`; for holdfast mix: {OPTIONS[key]})."
        )
    return first_prompts(pool.rows, max(1, min(most, int(unique * share))), seed, name)


def _only(pool: Pool, held: Sequence[str]) -> Pool:
    """The pool with the first row of each held-out prompt, in the order of `held`."""
    rows = pool.rows.one_of_each_prompt().with_prompts(held)
    places = {prompt_key(row): i for i, row in enumerate(rows)}
    return replace(pool, rows=rows.pick([places[key] for key in held]), taken="held out")


def _at_most(pool: Pool, size: int, seed: int, name: str) -> Pool:
    return replace(pool, rows=draw(pool, min(size, len(pool.rows)), seed, name, "test rows"))
