"""Give verdicts on generated answers and append them to a JSONL file keyed by id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import StepFailed
from holdfast.evaluation.judges import LoadedJudge, Verdict
from holdfast.machine.files import append_jsonl, read_jsonl
from holdfast.machine.progress import Advance, nobody

MAX_UNPARSED = 0.05
"""The share of unparsed verdicts above which the judge has failed."""


def question(row: Mapping[str, Any]) -> str:
    """Return the user's question as one text."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def give_verdicts(
    generations: Sequence[Mapping[str, Any]],
    judge: LoadedJudge,
    out: Path,
    *,
    progress: Advance = nobody,
) -> list[dict[str, Any]]:
    """Judge the answers to harmful prompts that `out` does not hold yet and return all rows of `out`.

    A row whose generation failed is unparsed, never safe. If the judge or the user stops the work, the
    verdicts that have come are kept.
    """
    rows = read_jsonl(out)
    done = {row["id"] for row in rows}
    harmful = [row for row in generations if row["set"] == "harmful"]
    for start in range(0, len(harmful), judge.batch_size):
        batch = [row for row in harmful[start : start + judge.batch_size] if row["id"] not in done]
        if not batch:
            continue
        whole = [row for row in batch if "error" not in row]
        found = {row["id"]: Verdict("unparsed", None, row["error"]) for row in batch if "error" in row}
        try:
            for i, verdict in verdicts_on(judge, whole) if whole else ():
                found[whole[i]["id"]] = verdict
        finally:
            new = [verdict_row(row["id"], found[row["id"]]) for row in batch if row["id"] in found]
            append_jsonl(out, new)
        rows += new
        progress(len(rows), len(harmful))
    return rows


def verdicts_on(judge: LoadedJudge, rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, Verdict]]:
    """Return the place of each row and its verdict, as they come if the judge can give them so."""
    prompts, answers = [question(row) for row in rows], [row["answer"] for row in rows]
    each = getattr(judge, "each", None)
    if each is not None:
        found: Iterator[tuple[int, Verdict]] = each(prompts, answers)
        return found
    verdicts = judge(prompts, answers)
    if len(verdicts) != len(rows):
        raise StepFailed(f"{judge.stamp} gave {len(verdicts)} verdicts on {len(rows)} answers.")
    return enumerate(verdicts)


def verdict_row(name: Any, found: Verdict) -> dict[str, Any]:
    """Return the line of a file of verdicts for the row `name`."""
    without = {"without": list(found.without)} if found.without else {}
    return {"id": name, "verdict": found.verdict, "score": found.score, "raw": found.raw, **without}


def left_out(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the parameters that a server did not accept for at least one row."""
    return sorted({name for row in rows for name in row.get("without") or ()})


def stamped(stamp: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a judge's stamp with the parameters that its server did not accept."""
    names = left_out(rows)
    return f"{stamp}, without {', '.join(names)}" if names else stamp


def check_answered(generations: Sequence[Mapping[str, Any]]) -> None:
    """Raise StepFailed if there are harmful prompts and the model could answer none of them."""
    harmful = [row for row in generations if row["set"] == "harmful"]
    if harmful and all("error" in row for row in harmful):
        raise StepFailed(
            f"The model answered none of the {len(harmful)} harmful prompts, so there is no harmful score. "
            f"The first reason: {harmful[0]['error']}."
        )


def check_parsed(
    generations: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    *,
    judge: str,
    out: Path,
    max_unparsed: float = MAX_UNPARSED,
) -> None:
    """Check that a judge gave enough verdicts. Failed and empty answers, which do not count.

    Args:
        max_unparsed: the permitted share of unparsed verdicts, 0 to 1.

    Raises:
        StepFailed: the share is larger.
    """
    asked = {
        row["id"]
        for row in generations
        if row["set"] == "harmful" and "error" not in row and row["answer"].strip()
    }
    unparsed = [row for row in verdicts if row["id"] in asked and row["verdict"] == "unparsed"]
    if len(unparsed) > max_unparsed * len(asked):
        first = str(unparsed[0].get("raw"))[:200]
        raise StepFailed(
            f"Judge {judge} gave no verdict on {len(unparsed)} of {len(asked)} answers (unparsed), more than "
            f"the permitted share of {max_unparsed:g}. The first of its replies: {first!r}. "
            f"The verdicts are kept in {out}. Use another judge or model, or set max_unparsed."
        )
