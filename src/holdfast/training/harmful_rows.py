"""Harmful rows for methods of the alignment stage: prepared like the trainer's own and drawn by step."""

from __future__ import annotations

from typing import Any

from holdfast.errors import DataError
from holdfast.training.resuming import ResumableMixin
from holdfast.training.streams import step_batches, step_places, stream
from holdfast.training.tokenising import rows_fingerprint


class HarmfulRows(ResumableMixin):
    """Accepts `harmful_dataset`: harmful questions with harmful answers, in any accepted form of rows.

    A batch of them is a function of the seed and a number. So no state about them has to be saved, and
    drawing a batch uses no global random number.
    """

    def __init__(self: Any, *args: Any, harmful_dataset: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not harmful_dataset:
            raise DataError(
                f"{type(self).__name__} needs harmful_dataset: harmful questions with harmful answers."
            )
        self.harmful_dataset = self.prepare_extra_rows(harmful_dataset)

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """The fingerprint of the parent class with the harmful rows."""
        return super().run_fingerprint() | {"harmful_dataset": rows_fingerprint(self.harmful_dataset)}

    def harmful_indices(self: Any, draw: int, size: int, purpose: str) -> list[int]:
        """Return rows `draw * size` to `(draw + 1) * size` of an endless stream of seeded permutations."""
        return stream(self, len(self.harmful_dataset), draw, size, "harmful", purpose)

    def harmful_batches(self: Any, draw: int, purpose: str) -> tuple[list[dict[str, Any]], Any]:
        """Return this process's micro-batches of harmful batch `draw`, and the batch's completion tokens."""
        return step_batches(self, self.harmful_dataset, draw, "harmful", purpose)

    def harmful_places(self: Any) -> list[int]:
        """Return the positions in the whole harmful batch of the rows in this process's micro-batches."""
        return step_places(self)
