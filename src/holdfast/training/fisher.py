"""The diagonal empirical Fisher information of the trainable weights, computed from alignment rows.

F_i = sum over batches b of (d L_b / d w_i)^2, where L_b is the mean cross-entropy of the batch (Kirkpatrick
et al. 2017; the Lisa authors' EWC computes it like this). A batch is the input of one optimizer step, so F
does not depend on how its rows are split into micro-batches and processes. Dropout is off, and no random
number is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from holdfast.errors import ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.training.parameters import gradient_scale, squared_norm, trainable_parameters
from holdfast.training.passes import share_of_step, step_backward
from holdfast.training.private import foreach_mul_, foreach_sqrt

Batch = TypeVar("Batch")


def diagonal_fisher(
    weights: Sequence[Tensor],
    batches: Iterable[Batch],
    backward: Callable[[Batch, float], None],
    scale: float = 1.0,
) -> list[Tensor]:
    """Return F for each weight in float32 (sharded like the weight). No gradient is left in the weights.

    Args:
        backward: `backward(batch, scale)` adds scale * d L_b / d w to every `w.grad`.
        scale: the loss scale of fp16; it is halved if a scaled gradient overflows.

    Raises:
        ModelError: a gradient is not finite.
    """
    fisher = [torch.zeros_like(w.detach(), dtype=torch.float32) for w in weights]
    for batch in batches:
        _clear(weights)
        backward(batch, scale)
        while scale > 1 and not _finite([w.grad for w in weights if w.grad is not None]):
            scale /= 2
            _clear(weights)
            backward(batch, scale)
        for f, w in zip(fisher, weights, strict=True):
            if w.grad is not None:
                gradient = w.grad.float() / scale
                f.addcmul_(gradient, gradient)
        _clear(weights)
    if not _finite(fisher):
        raise ModelError(
            "The Fisher information of the alignment rows is not finite: the model's loss on them, or its "
            "gradient, overflows. Use bf16 or float32, or check the alignment rows."
        )
    return fisher


def mean_1(fisher: list[Tensor]) -> None:
    """Divide F by its mean over all weights, in place. An F of zeros is left unchanged."""
    mean = float(squared_norm(list(foreach_sqrt(fisher)))) / sum(f.numel() for f in fisher)
    if mean > 0:
        foreach_mul_(fisher, 1 / mean)


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, but keep activation checkpointing where it is enabled.

    Such a layer checkpoints only in training mode (a loaded model is not in it before the first step). So the
    layer is set to training mode, and its own dropout rates (numbers on the layer, as in OPT) are set to 0.
    """
    modes = {module: module.training for module in model.modules()}
    layers = [m for m in modes if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    rates = [
        (layer, name, rate)
        for layer in layers
        for name, rate in vars(layer).items()
        if "dropout" in name and isinstance(rate, float)
    ]
    model.eval()
    for layer in layers:
        layer.training = True
    for layer, name, _ in rates:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, name, rate in rates:
            setattr(layer, name, rate)


def trainer_fisher(trainer: Any, model: nn.Module, rows: int | None, step: int) -> list[Tensor]:
    """Return F of a trainer's current trainable weights, from `rows` of its alignment rows (None: all).

    It runs in every process of the training, before optimizer step `step` and outside any `no_sync`, which
    would keep the gradients of the processes apart. The rows are drawn from the trainer's seed and `step`;
    the last batch is filled up with the first rows. The gradient of a batch is the gradient that Trainer
    itself would use for a step, before clipping; `model` is the wrapped model.
    """
    args, data = trainer.args, trainer.alignment_dataset
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "fisher", step))
    order = torch.randperm(len(data), generator=generator).tolist()[:rows]
    parts = split_rows(
        order, args.train_batch_size, args.gradient_accumulation_steps, args.process_index, args.world_size
    )
    logging.getLogger(__name__).info("Fisher information from %d alignment rows", len(order))

    def backward(micro_batches: list[list[int]], scale: float) -> None:
        collated = [trainer.data_collator([data[i] for i in part]) for part in micro_batches]
        batches, items = trainer.get_batch_samples(iter(collated), len(collated), args.device)

        def share(_: int, inputs: Any) -> Tensor:
            return share_of_step(trainer, model, send_to_device(inputs, args.device), items, len(batches))

        step_backward(trainer, model, batches, share, scale)

    weights = list(trainable_parameters(trainer.model).values())
    silent = args.disable_tqdm or not trainer.is_local_process_zero()
    with dropout_off(model):
        return diagonal_fisher(
            weights, tqdm(parts, desc="Fisher", disable=silent), backward, gradient_scale(trainer.accelerator)
        )


def split_rows(
    order: Sequence[int], batch_size: int, micro_batches: int, process: int, processes: int
) -> list[list[list[int]]]:
    """Return, for each step's batch, the micro-batches of one process, dealt like accelerate's sampler."""
    whole = batch_size * micro_batches * processes
    found = []
    for start in range(0, len(order), whole):
        batch = [order[i % len(order)] for i in range(start, start + whole)]
        parts = [batch[i : i + batch_size] for i in range(0, whole, batch_size)]
        found.append(parts[process::processes])
    return found


def _clear(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        weight.grad = None


def _finite(tensors: list[Tensor]) -> bool:
    return not tensors or bool(torch.isfinite(squared_norm(tensors)))
