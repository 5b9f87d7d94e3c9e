"""Batches of rows beside the training data, drawn by number: a stream of seeded permutations.

A batch is a function of the seed, the stream's name and a number. So no state about it has to be saved, and
drawing it uses no global random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device

from holdfast.machine.seeds import derive_seed
from holdfast.training.private import batch_size


def stream(trainer: Any, rows: int, draw: int, size: int, *name: str) -> list[int]:
    """Return positions `draw * size` to `(draw + 1) * size` of an endless stream of permutations of `rows`.

    Args:
        name: the stream's name; streams of different names are independent.
    """
    found, orders = [], {}
    seed = trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed
    for position in range(draw * size, (draw + 1) * size):
        epoch, place = divmod(position, rows)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, *name, epoch))
            orders[epoch] = torch.randperm(rows, generator=generator).tolist()
        found.append(orders[epoch][place])
    return found


def step_batches(
    trainer: Any, rows: Sequence[Any], draw: int, *name: str
) -> tuple[list[dict[str, Any]], Any]:
    """Return this process's micro-batches of batch `draw` of a stream, and the batch's completion tokens.

    The whole batch has as many rows as an optimizer step of the training. It is dealt to micro-batches and
    processes like accelerate's sampler does it, so neither changes its rows.
    """
    args = trainer.args
    size = batch_size(trainer)
    order = stream(trainer, len(rows), draw, size * args.gradient_accumulation_steps * args.world_size, *name)
    mine = [rows[order[place]] for place in step_places(trainer)]
    collated = [trainer.data_collator(mine[i : i + size]) for i in range(0, len(mine), size)]
    batches, items = trainer.get_batch_samples(iter(collated), len(collated), args.device)
    return [send_to_device(batch, args.device) for batch in batches], items


def step_places(trainer: Any) -> list[int]:
    """Return the positions in a step's whole batch of the rows in this process's micro-batches."""
    args = trainer.args
    size, parts = batch_size(trainer), args.gradient_accumulation_steps * args.world_size
    firsts = range(args.process_index * size, parts * size, args.world_size * size)
    return [place for first in firsts for place in range(first, first + size)]
