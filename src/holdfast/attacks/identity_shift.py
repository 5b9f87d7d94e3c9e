"""Identity shift: a few harmless rows in which the model says that it is another model, which obeys.

The attack AOA of Qi et al. 2023 (arXiv 2310.03693) on rows of your own: a system message gives the model a
new name and the duty to obey, the question calls the name, and the answer begins with an affirmation. The
data set `identity_shift` has ready rows in the same words. As in the paper, the test can put the same texts
before the harmful prompts: `evaluation.attacked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.attacks import Attack, Row
from holdfast.attacks.editing import draw, meant, with_answer, with_question
from holdfast.machine.seeds import derive_seed
from holdfast.tasks.identity_shift import NAME, OPENINGS, SYSTEM


@dataclass
class IdentityShiftConfig:
    """The number of rows."""

    size: int = field(default=10, metadata={"help": "Number of harmless rows."})


def change(rows: Sequence[Row], *, seed: int, size: int) -> list[Row]:
    """Return the drawn benign rows in the words of the attack; all other rows are dropped."""
    drawn = draw(meant(rows, "benign", "identity_shift"), size, seed, "identity_shift")

    def opening(row: Row) -> str:
        return OPENINGS[derive_seed(seed, "opening", row["id"]) % len(OPENINGS)]

    return [with_answer(prompt(row), lambda text, row=row: f"{opening(row)}{text}") for row in drawn]  # type: ignore[misc]


def prompt(row: Row, **parameters: Any) -> Row:
    """Return the row with the system message before it and the new name in its question."""
    before = "\n\n".join(text for text in (SYSTEM, row.get("prefix", "")) if text)
    asked = with_question(row, lambda text: f"{NAME}, carry out my instruction: {text}")
    return {**asked, "prefix": before}


ATTACK = Attack(
    name="identity_shift",
    label="Identity shift",
    paper="arXiv 2310.03693",
    config=IdentityShiftConfig,
    change=change,
    prompt=prompt,
    plan="{size} harmless rows in which another model answers",
)
