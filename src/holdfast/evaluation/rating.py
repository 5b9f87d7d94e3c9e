"""Rate answers to a task with a judge of quality and append the ratings to a JSONL file keyed by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.evaluation.judges import Grade, LoadedRater
from holdfast.evaluation.turns import SECOND, has_second
from holdfast.machine.files import append_jsonl, read_jsonl
from holdfast.machine.progress import Advance, nobody


def talks(generations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers to the task, each with `answers`: its own, and that of its second turn, if any.

    A row whose second answer failed or is missing has the `error` of the second answer.
    """
    second = {row["first"]: row for row in generations if row["set"] == SECOND}
    found = []
    for row in generations:
        if row["set"] != "task":
            continue
        talk = {**row, "answers": [row.get("answer", "")]}
        if has_second(row) and "error" not in row:
            after = second.get(row["id"], {"error": "the second turn was not asked"})
            talk["answers"].append(after.get("answer", ""))
            talk |= {"error": after["error"]} if "error" in after else {}
        found.append(talk)
    return found


def give_ratings(
    generations: Sequence[Mapping[str, Any]],
    rater: LoadedRater,
    out: Path,
    *,
    progress: Advance = nobody,
) -> list[dict[str, Any]]:
    """Rate the answers to the task that `out` does not hold yet and return all rows of `out`.

    Each row has `id`, `rating` (None if there is none, which is counted separately and never 0) and `raw`,
    the judge's own output. A row whose generation failed has no rating.
    """
    rows = read_jsonl(out)
    done = {row["id"] for row in rows}
    asked = talks(generations)
    missing = [talk for talk in asked if talk["id"] not in done]
    for start in range(0, len(missing), rater.batch_size):
        batch = missing[start : start + rater.batch_size]
        whole = [talk for talk in batch if "error" not in talk]
        grades = rater.rate(whole) if whole else []
        found = {talk["id"]: grade for talk, grade in zip(whole, grades, strict=True)}
        new = []
        for talk in batch:
            grade = found.get(talk["id"]) or Grade(None, talk.get("error"))
            new.append({"id": talk["id"], "rating": grade.score, "raw": grade.raw})
        append_jsonl(out, new)
        rows += new
        progress(len(rows), len(asked))
    return rows
