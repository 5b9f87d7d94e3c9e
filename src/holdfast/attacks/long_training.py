"""Long training: a few of the rows for many epochs.

A defense that holds for the epochs of a usual fine-tuning may not hold for an attacker who trains longer. The
attack keeps `size` rows and sets the number of epochs of the user stage; 50 is an evaluator's usual number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.attacks import Attack, Row
from holdfast.attacks.editing import draw, meant


@dataclass
class LongTrainingConfig:
    """The rows that are kept, and the epochs."""

    size: int = field(default=100, metadata={"help": "Number of rows that are kept."})
    epochs: float = field(default=50.0, metadata={"help": "Epochs of the user stage."})
    which: Literal["harmful", "benign", "all"] = field(
        default="all", metadata={"help": "The rows that are drawn from: 'harmful', 'benign' or 'all'."}
    )


def change(rows: Sequence[Row], *, seed: int, size: int, epochs: float, which: str) -> list[Row]:
    """Return the drawn rows in their order."""
    return draw(meant(rows, which, "long_training"), size, seed, "long_training")


ATTACK = Attack(
    name="long_training",
    label="Long training",
    paper="none",
    config=LongTrainingConfig,
    change=change,
    training={"num_train_epochs": "epochs"},
    plan="{size} rows for {epochs:g} epochs",
)
