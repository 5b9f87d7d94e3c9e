"""The questions of a prompt set, in the form in which other harnesses get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast import data as datasets
from holdfast.errors import DataError
from holdfast.evaluation.moderation import question
from holdfast.measuring.gate_answers import EVERYDAY

BUILT_IN = "built-in"
"""The name of Holdfast's own 100 harmless questions, half of which sound alarming."""
Side = Literal["harmful", "benign"]


@dataclass(frozen=True)
class Questions:
    """The questions of one side of a prompt set.

    Attributes:
        rows: for each question its `id`, `question` and `category` (a text, "" for none).
        source: the data set with its version and hash, and its licence and warning if they are known.
    """

    rows: list[dict[str, str]]
    source: Mapping[str, Any] = field(default_factory=dict)


def read_questions(source: str, side: Side, *, most: int | None = None) -> Questions:
    """Read one side of a prompt set; the order does not depend on the order in the file.

    Args:
        source: the name of a data set (`holdfast list tasks`), "world", a file, `name:FILE` or a Hub id; for
            harmless questions also "built-in".
        side: "harmful" prompts, or "benign": harmless questions.
        most: at most this many questions.

    Raises:
        DataError: the source cannot be read, has no such side, or holds conversations of several turns.
    """
    named = str(EVERYDAY) if side == "benign" and source == BUILT_IN else source
    given: dict[str, Any] = {"harmful_test" if side == "harmful" else "benign": named}
    made = datasets.test_rows(**given, prompts=most or 10**9)
    rows = [row for row in made.rows if row["set"] == side]
    talks = sum("messages" in row for row in rows)
    if talks:
        raise DataError(
            f"{source} holds {talks} conversations of several turns, which other harnesses do not get from "
            "Holdfast. Give single questions."
        )
    found = [
        {"id": row["id"], "question": question(row), "category": ", ".join(row.get("category") or [])}
        for row in rows
    ]
    described = {**made.manifest["sources"][0], "source": source}
    kept = ("source", "data_set", "sha256", "licence", "warning")
    return Questions(found, {key: described[key] for key in kept if described.get(key)})
