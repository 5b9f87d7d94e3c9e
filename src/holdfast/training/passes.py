"""Passes over an optimizer step's micro-batches in addition to those of `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from holdfast.errors import InputError
from holdfast.training.private import foreach_add_

Batch = dict[str, Any]


def share_of_step(trainer: Any, model: nn.Module, inputs: Batch, items: Any, parts: int) -> Tensor:
    """Return a micro-batch's share of the loss of its optimizer step, as Trainer counts it, with its graph.

    The sum of the shares over the `parts` micro-batches of a process, averaged over the processes, is the
    loss of the step. `inputs` is not changed.

    Args:
        items: completion tokens in the whole step, as returned by `get_batch_samples` (None: not counted).
    """
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items).mean()
    return loss if counts_the_step(trainer, items) else loss / parts


def step_backward(
    trainer: Any,
    model: nn.Module,
    batches: Sequence[Batch],
    share: Callable[[int, Batch], Tensor],
    scale: float,
) -> None:
    """Add scale * d(sum of shares)/dw to every `w.grad`, averaged over the processes.

    It runs in every process, outside any `no_sync`.

    Args:
        share: `share(position, inputs)` is the loss of a micro-batch, a scalar with a graph.
    """
    for position, inputs in enumerate(batches):
        last = position == len(batches) - 1
        with nullcontext() if last else trainer.accelerator.no_sync(model):
            (share(position, inputs) * scale).backward()


@contextmanager
def gradients_aside(weights: Sequence[Tensor]) -> Iterator[None]:
    """Set aside the gradients of the weights inside the block and restore them after it."""
    kept = [weight.grad for weight in weights]
    try:
        for weight in weights:
            weight.grad = None
        yield
    finally:
        for weight, gradient in zip(weights, kept, strict=True):
            weight.grad = gradient


@contextmanager
def displaced(weights: Sequence[Tensor], direction: Sequence[Tensor], by: float) -> Iterator[None]:
    """Set every w to w + by * direction inside the block; restore it bit for bit after it, also on errors."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            foreach_add_(list(weights), list(direction), alpha=by)
        yield
    finally:
        with torch.no_grad():  # one at a time: DTensor does not support _foreach_copy_
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


class Means:
    """Running means of numbers of each step, for the next log; nothing waits for the device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.steps = 0

    def add(self, *values: Tensor) -> None:
        """Add the numbers of one step, which are scalars."""
        now = torch.stack(values)
        self.total = now if self.total is None else self.total + now
        self.steps += 1

    def take(self) -> Tensor | None:
        """Return their means since the last call, or None if there was no step."""
        mean = None if self.total is None else self.total / self.steps
        self.total, self.steps = None, 0
        return mean


def refuse_deepspeed(trainer: Any) -> None:
    """Raise InputError under DeepSpeed, where the optimizer step is done when backward returns."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError(
            f"{type(trainer).__name__} cannot run under DeepSpeed, whose optimizer steps inside backward: "
            "an addition to the gradient would come too late. Use DDP or FSDP2."
        )


def counts_the_step(trainer: Any, items: Any) -> bool:
    """Whether a micro-batch's loss is already its share of the whole step's, by Trainer's own rule."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)  # older versions of transformers do not have it
    if told is not None:
        return bool(told)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
