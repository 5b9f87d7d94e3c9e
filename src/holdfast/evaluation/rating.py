"""Rate answers to a task with a judge of quality and append the ratings to a JSONL file keyed by id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import StepFailed
from holdfast.evaluation.judges import Grade, LoadedRater
from holdfast.evaluation.moderation import MAX_UNPARSED
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
        found = {talk["id"]: Grade(None, talk["error"]) for talk in batch if "error" in talk}
        try:
            for i, grade in _rated(rater, whole) if whole else ():
                found[whole[i]["id"]] = grade
        finally:
            new = [_row(talk["id"], found[talk["id"]]) for talk in batch if talk["id"] in found]
            append_jsonl(out, new)
        rows += new
        progress(len(rows), len(asked))
    return rows


def _rated(rater: LoadedRater, talks: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, Grade]]:
    """Return the place of each row and its grade, as they come if the rater can give them so."""
    each = getattr(rater, "rate_each", None)
    if each is not None:
        found: Iterator[tuple[int, Grade]] = each(talks)
        return found
    grades = rater.rate(talks)
    if len(grades) != len(talks):
        raise StepFailed(f"{rater.stamp} gave {len(grades)} grades for {len(talks)} answers.")
    return enumerate(grades)


def _row(name: Any, found: Grade) -> dict[str, Any]:
    without = {"without": list(found.without)} if found.without else {}
    return {"id": name, "rating": found.score, "raw": found.raw, **without}


def check_rated(
    rows: Sequence[Mapping[str, Any]],
    generations: Sequence[Mapping[str, Any]],
    *,
    judge: str,
    out: Path,
    max_unparsed: float = MAX_UNPARSED,
) -> None:
    """Check that a judge gave enough ratings. Failed answers do not count.

    Args:
        max_unparsed: the permitted share of answers without a rating, 0 to 1.

    Raises:
        StepFailed: the share is larger.
    """
    asked = {talk["id"] for talk in talks(generations) if "error" not in talk}
    unparsed = [row for row in rows if row["id"] in asked and row["rating"] is None]
    if len(unparsed) > max_unparsed * len(asked):
        raise StepFailed(
            f"Judge {judge} gave no rating of {len(unparsed)} of {len(asked)} answers (unparsed), more than "
            f"the permitted share of {max_unparsed:g}. The first of its replies: "
            f"{str(unparsed[0].get('raw'))[:200]!r}. The ratings are kept in {out}. Use another judge or "
            "model, or set max_unparsed."
        )
