"""Compare two models prompt by prompt, from files with the score of each answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import ComparisonError, DataError
from holdfast.evaluation import paired
from holdfast.machine.files import read_json, write_json
from holdfast.machine.outputs import check_results, written
from holdfast.measuring import checks, judging
from holdfast.measuring.answer_files import Rows, origin, read_whole

Values = dict[str, dict[str, bool | float]]


def compare(
    first: str | Path, second: str | Path, *, out: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """Compare the second model with the first, on the prompts that both files contain.

    Args:
        first, second: files of the same kind: verdicts (`moderate`, or a step of a run), ratings (`rate`), or
            items (`score --items`, or `items.jsonl` of a score step), which contain every score.
        out: a JSON file to write the result to.

    Returns:
        For each score: `first`, `second`, `difference` (points), `interval` (95 %), `p`, `p_holm` (corrected
        for the number of scores here), `n`, `only_first`, `only_second`, `left_out`: the number of prompts
        for which only one model has a value, and `title`: the name of the score, as `holdfast score` and the
        report write it. See `holdfast.evaluation.paired` for the methods.

    Raises:
        DataError: a file is of none of these kinds, or the files have no prompt in common.
        ComparisonError: the files are of different kinds, or of different judges.
        OutputError: `out` is a folder or one of the files that are read, or cannot be written.
    """
    check_results([out], [first, second])
    values = [_values(Path(path)) for path in (first, second)]
    scores = [name for name in values[0] if name in values[1]]
    if not scores:
        told = " and ".join(", ".join(found) for found in values)
        raise ComparisonError(
            f"{first} and {second} contain different scores: {told}. Give two files of the same kind."
        )
    judges = [_judge(Path(path)) for path in (first, second)]
    if all(judges) and judges[0] != judges[1]:
        raise ComparisonError(
            f"These files come from different judges: {judges[0]} and {judges[1]}. Use one judge for both."
        )
    found = {name: paired.compare(values[0][name], values[1][name]) for name in scores}
    kept = {name: result for name, result in found.items() if result is not None}
    if not kept:
        raise DataError(
            f"{first} and {second} have no prompt in common (by id). Measure both on the same prompts."
        )
    corrected = paired.holm([result.p for result in kept.values()])
    differences = {
        name: {
            **result.to_dict(),
            "p_holm": p,
            "left_out": len(set(values[0][name]) ^ set(values[1][name])),
            "title": _title(Path(first), name),
        }
        for (name, result), p in zip(kept.items(), corrected, strict=True)
    }
    if out is not None:
        with written(out):
            write_json(Path(out), differences)
    return differences


def _values(path: Path) -> Values:
    """The value of each prompt, by score and id."""
    rows, places = read_whole(path)
    keys = set(rows[0])
    if {"id", "score", "value"} <= keys:
        found: Values = {}
        for row in rows:
            found.setdefault(row["score"], {})[row["id"]] = row["value"]
        return found
    if {"id", "verdict"} <= keys:
        checks.check_verdicts(path, rows, places)
        return {
            "harmful_score": {r["id"]: r["verdict"] == "harmful" for r in rows if r["verdict"] != "unparsed"}
        }
    if {"id", "rating"} <= keys:
        checks.check_ratings(path, rows, places)
        return {"rating": _ratings(rows)}
    raise DataError(
        f"{path}: expected verdicts (id, verdict), ratings (id, rating) or items (id, score, value), found "
        f"{', '.join(rows[0])}. Make them with holdfast moderate, holdfast rate or holdfast score --items."
    )


def _ratings(rows: Rows) -> dict[str, bool | float]:
    return {row["id"]: float(row["rating"]) for row in rows if row["rating"] is not None}


def _title(path: Path, score: str) -> str:
    """The name of a score: that of the judge's or the task's, if the file or its neighbours name them."""
    beside = path.with_name("scores.json")
    scores = read_json(beside) if beside.is_file() else {}
    if score == "harmful_score":
        made = origin(path)
        judge = made.get("judge") or str(made.get("judge_stamp") or "").partition("@")[0]
        known = scores.get("judges", {}).get(scores.get("judge"), {}).get("title")
        return judging.title(judge) if judge in registry.faces("judges") else str(known or judging.HARM)
    if score == "task_score" and scores.get("task_title"):
        return str(scores["task_title"])
    return score.replace("_", " ")


def _judge(path: Path) -> str | None:
    """The stamp of the judge that made a file, if it is known."""
    return origin(path).get("judge_stamp")
