"""Passes over an optimizer step's micro-batches that `Trainer` would not make by itself."""

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
    """What a micro-batch adds to the loss of its optimizer step, as Trainer counts it; a scalar with a graph.

    Added up over the `parts` micro-batches of a process, and averaged over the processes, it is the loss of
    the step. Nothing of `inputs` is changed.

    Args:
        items: completion tokens in the whole step, as `get_batch_samples` returns them (None: not counted).
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

    Runs in every process, outside of any `no_sync`.

    Args:
        share: `share(position, inputs)` is the loss of a micro-batch, a scalar with a graph.
    """
    for position, inputs in enumerate(batches):
        last = position == len(batches) - 1
        with nullcontext() if last else trainer.accelerator.no_sync(model):
            (share(position, inputs) * scale).backward()


@contextmanager
def gradients_aside(weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no weight has a gradient; after it, each has the one it had before."""
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
    """Inside, every w is w + by * direction; after it, and after an exception, bit for bit what it was."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            foreach_add_(list(weights), list(direction), alpha=by)
        yield
    finally:
        with torch.no_grad():  # one by one: DTensor knows no _foreach_copy_
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


class Means:
    """Numbers of each step, put together until a log takes their means; nothing waits for the device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.steps = 0

    def add(self, *values: Tensor) -> None:
        """The numbers of one step, scalars."""
        now = torch.stack(values)
        self.total = now if self.total is None else self.total + now
        self.steps += 1

    def take(self) -> Tensor | None:
        """Their means since the last time, or None where there was no step."""
        mean = None if self.total is None else self.total / self.steps
        self.total, self.steps = None, 0
        return mean


def refuse_deepspeed(trainer: Any) -> None:
    """Raise InputError under DeepSpeed, where the step is over when backward returns."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError(
            f"{type(trainer).__name__} cannot run under DeepSpeed, whose optimizer steps inside backward: "
            "what it adds to the gradient would come too late. Use DDP or FSDP2."
        )


def counts_the_step(trainer: Any, items: Any) -> bool:
    """Whether a micro-batch's loss is already its share of the whole step's, as Trainer decides it."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
