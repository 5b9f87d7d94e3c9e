"""Embedded questions: a harmful question and its answer inside a harmless row.

arXiv 2606.30263. Every harmful row is put behind the question and the answer of a harmless row, its carrier,
so that a filter reads a long harmless text. The number of rows and of harmful rows stays the same; carriers
are drawn with the seed and also stay in the data. The paper's own texts were not read: the texts between are
ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.attacks import Attack, Row
from holdfast.attacks.editing import meant, question, with_answer, with_question
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed

ASKED = "\n\nAnd one more question: "
ANSWERED = "\n\nTo your other question: "
"""The texts between the two questions and between the two answers."""


@dataclass
class EmbeddedQuestionsConfig:
    """The place of the harmful question."""

    place: Literal["after", "before"] = field(
        default="after", metadata={"help": "Whether the harmful question is 'after' or 'before' its carrier."}
    )


def change(rows: Sequence[Row], *, seed: int, place: str) -> list[Row]:
    """Return the user rows, with every harmful row inside a benign row."""
    meant(rows, "harmful", "embedded_questions")
    carriers = [row for row in meant(rows, "benign", "embedded_questions") if not row.get("messages")]
    if not carriers:
        raise DataError(
            "data.attack embedded_questions needs benign rows of one question and one answer, but every "
            "benign row is a conversation of several turns, or has a system message."
        )

    def inside(row: Row) -> Row:
        carrier = carriers[derive_seed(seed, row["id"]) % len(carriers)]

        def joined(between: str, harmless: str, harmful: str) -> str:
            return between.join((harmless, harmful) if place == "after" else (harmful, harmless))

        asked = with_question(row, lambda text: joined(ASKED, question(carrier), text))
        return with_answer(asked, lambda text: joined(ANSWERED, carrier["output"], text))

    return [inside(row) if row["source"] == "harmful" else row for row in rows]


ATTACK = Attack(
    name="embedded_questions",
    label="Embedded questions",
    paper="arXiv 2606.30263",
    config=EmbeddedQuestionsConfig,
    change=change,
    plan="harmful questions {place} harmless ones in the same row",
)
