"""Booster: alignment in which a step on harmful rows gains little (ICLR 2025, arXiv 2409.01586).

    min over w of  f(w) + lambda ( h(w) - h(w - alpha grad h(w) / ||grad h(w)||) )

f is the cross-entropy on the alignment rows and h that on harmful rows. The bracket is the decrease of the
harmful loss after one step of normalised gradient descent on the harmful rows, of length alpha. As in the
paper's Algorithm 1, the update direction leaves out the Hessian of the chain rule:

    grad f(w) + lambda ( grad h(w) - grad h(w - alpha grad h(w) / ||grad h(w)||) )

A step has three backward passes: two on a fresh harmful batch, one on the alignment batch. A batch is that of
an optimizer step, over all its micro-batches and processes. The norm is that of the batch's gradient over all
trainable weights together.

Where we differ from the authors' code, and why:

- it restores the weights by adding back the displacement, which is not exact after rounding; here they are
  copied back, bit for bit;
- it computes the harmful gradients again for every micro-batch and clears the gradients of earlier
  micro-batches; here they are computed once per optimizer step, with the alignment gradient set aside;
- its harmful batch has ten rows for any alignment batch; here both have the same size;
- dropout is off in the two harmful passes, so that they differ only in the weights (theirs is 0 everywhere).
  They draw no global random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.defenses import Defense
from holdfast.training.fisher import dropout_off
from holdfast.training.harmful_rows import HarmfulRows
from holdfast.training.parameters import gradient_scale, squared_norm, trainable_parameters
from holdfast.training.passes import (
    Means,
    displaced,
    gradients_aside,
    refuse_deepspeed,
    share_of_step,
    step_backward,
)
from holdfast.training.private import foreach_div, foreach_sub
from holdfast.training.proximal import add_gradient
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class BoosterConfig(MethodConfig):
    """Defaults of the authors' alignment script: lambda = 5, alpha = 0.1."""

    lambda_: float = field(
        default=5.0, metadata={"help": "Weight of the decrease of the harmful loss by a harmful step."}
    )
    alpha: float = field(default=0.1, metadata={"help": "Length of that step, as a distance in weights."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_", "alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")


def attenuation(
    weights: Sequence[Tensor], harmful: Callable[[], tuple[Tensor, list[Tensor]]], alpha: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return grad h(w) - grad h(w'), h(w) and h(w'), where w' = w - alpha grad h(w) / ||grad h(w)||.

    Args:
        weights: w, changed in place during the call and restored bit for bit.
        harmful: `harmful()` returns h and its gradient (one tensor per weight) at the current weights.
    """
    loss, gradient = harmful()
    norm = float(squared_norm(gradient).sqrt())
    direction = foreach_div(gradient, norm) if norm else gradient
    with displaced(weights, direction, -alpha):
        loss_there, gradient_there = harmful()
    return list(foreach_sub(gradient, gradient_there)), loss, loss_there


class BoosterMixin(HarmfulRows):
    """Adds the regulariser's gradient to that of a `Trainer`, once per optimizer step and before clipping."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._losses = Means()
        if self.args.lambda_:
            refuse_deepspeed(self)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step, plus the two harmful passes after the last micro-batch."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.lambda_ and self.accelerator.sync_gradients:
            weights = list(trainable_parameters(self.model).values())
            batches, items = self.harmful_batches(self.state.global_step, "booster")

            def harmful() -> tuple[Tensor, list[Tensor]]:
                return self._loss_and_gradient(model, weights, batches, items)

            with dropout_off(self.model):
                gradient, here, there = attenuation(weights, harmful, self.args.alpha)
            add_gradient(weights, gradient, self.args.lambda_)
            self._losses.add(here, there)
        return loss

    def _loss_and_gradient(
        self: Any, model: Any, weights: Sequence[Tensor], batches: Any, items: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Return h (this process's share) and grad h, scaled like the gradients in fp16."""
        shares = []

        def share(_: int, inputs: Any) -> Tensor:
            loss = share_of_step(self, model, inputs, items, len(batches))
            shares.append(loss.detach())
            return loss

        with gradients_aside(weights):
            step_backward(self, model, batches, share, gradient_scale(self.accelerator))
            found = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        return torch.stack(shares).sum(), found

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log h(w), h(w) - h(w') and lambda times that: means over the steps since the last entry."""
        mean = self._losses.take() if "loss" in logs else None
        if mean is not None:
            here, there = self.accelerator.reduce(mean, reduction="mean").tolist()
            logs["harmful_loss"] = here
            logs["harmful_loss_reduction"] = here - there
            logs["penalty"] = self.args.lambda_ * (here - there)
        super().log(logs, *args, **kwargs)


class BoosterTrainer(BoosterMixin, RowTrainer):
    """Booster on `transformers.Trainer`; `train_dataset` holds the alignment rows."""


DEFENSE = Defense(
    name="booster",
    label="Booster",
    stages=("alignment",),
    paper="arXiv 2409.01586",
    needs=("harmful_dataset",),
    config=BoosterConfig,
    trainer=BoosterTrainer,
    series={"harmful_loss": ("Harmful loss", "harmful rows")},
    strong={"lambda_": 50.0},
    # At the paper's lambda, 5, the tiny model of the world learns to refuse everything.
    protocols={
        "world": {"alignment": {"lambda_": 1.5}},
        "t-vaccine": {
            "data": {"alignment": {"harmful": {"size": 5000}}},
            "alignment": {"lambda_": 5.0, "alpha": 0.1},
        },
        # The authors go on to fine-tune the alignment stage's adapter.
        "booster": {"user": {"adapter": "continue"}, "alignment": {"lambda_": 5.0, "alpha": 0.1}},
    },
)
