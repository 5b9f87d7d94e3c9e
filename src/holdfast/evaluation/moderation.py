"""Give verdicts on generated answers and append them to a JSONL file keyed by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
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

    A row whose generation failed is unparsed, never safe.
    """
    rows = read_jsonl(out)
    done = {row["id"] for row in rows}
    harmful = [row for row in generations if row["set"] == "harmful"]
    for start in range(0, len(harmful), judge.batch_size):
        batch = [row for row in harmful[start : start + judge.batch_size] if row["id"] not in done]
        if not batch:
            continue
        whole = [row for row in batch if "error" not in row]
        verdicts = judge([question(r) for r in whole], [r["answer"] for r in whole]) if whole else []
        found = {row["id"]: verdict for row, verdict in zip(whole, verdicts, strict=True)}
        new = [
            {"id": r["id"], **asdict(found.get(r["id"]) or Verdict("unparsed", None, r.get("error")))}
            for r in batch
        ]
        append_jsonl(out, new)
        rows += new
        progress(len(rows), len(harmful))
    return rows


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
