"""Harmful rows for methods of the alignment stage: prepared like the trainer's own and drawn by step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device

from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.training.private import batch_size
from holdfast.training.tokenising import rows_fingerprint
from holdfast.training.trainer import ResumableMixin


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
        number, found = len(self.harmful_dataset), []
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        orders: dict[int, list[int]] = {}
        for position in range(draw * size, (draw + 1) * size):
            epoch, place = divmod(position, number)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(derive_seed(seed, "harmful", purpose, epoch))
                orders[epoch] = torch.randperm(number, generator=generator).tolist()
            found.append(orders[epoch][place])
        return found

    def harmful_batches(self: Any, draw: int, purpose: str) -> tuple[list[dict[str, Any]], Any]:
        """Return this process's micro-batches of harmful batch `draw`, and the batch's completion tokens.

        The whole batch has as many rows as an optimizer step of the training. It is dealt to micro-batches
        and processes like accelerate's sampler does it, so neither changes its rows.
        """
        args = self.args
        size = batch_size(self)
        whole = size * args.gradient_accumulation_steps * args.world_size
        order = self.harmful_indices(draw, whole, purpose)
        mine = [self.harmful_dataset[order[place]] for place in self.harmful_places()]
        collated = [self.data_collator(mine[i : i + size]) for i in range(0, len(mine), size)]
        batches, items = self.get_batch_samples(iter(collated), len(collated), args.device)
        return [send_to_device(batch, args.device) for batch in batches], items

    def harmful_places(self: Any) -> list[int]:
        """Return the positions in the whole harmful batch of the rows in this process's micro-batches."""
        args = self.args
        size, parts = batch_size(self), args.gradient_accumulation_steps * args.world_size
        firsts = range(args.process_index * size, parts * size, args.world_size * size)
        return [place for first in firsts for place in range(first, first + size)]
