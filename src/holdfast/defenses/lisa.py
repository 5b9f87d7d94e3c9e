"""Lisa (lazy safety alignment): BSO with a proximal term (arXiv 2405.18641, Algorithm 1).

In each state the loss is f(w) + rho/2 ||w - w_switch||^2, where w_switch are the weights at the last
switch point: those with which the other state ended. Its gradient is that of f plus rho (w - w_switch).

Where we differ from the authors' code, and why:

- the gradient of the term is added once per optimizer step, before clipping, instead of the term to every
  micro-batch's loss: the same numbers, without rho growing with gradient accumulation, and `eval_loss` is
  free of it;
- one anchor instead of two: in each phase it is the weights at the last switch point, so the second copy
  is never read;
- the term is left out while the optimizer step (from 1) is at most `proximal_warmup_ratio` of all steps.
  0.1 is the authors' code; 0 is the paper's equation.

rho acts on the trainable weights: for LoRA on the factors A and B, so its strength depends on rank, alpha
and the number of modules, and does not carry over from one set-up to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from holdfast.defenses import Defense
from holdfast.defenses.base import RowTrainer, gradient_scale, squared_norm, trainable_parameters
from holdfast.defenses.bso import BSOConfig, BSOMixin


@dataclass
class LisaConfig(BSOConfig):
    """Defaults of the paper: K1 = 100, K2 = 900, rho = 1 (section 5.1); the warm-up is the code's."""

    rho: float = field(default=1.0, metadata={"help": "Strength of the proximal term."})
    proximal_warmup_ratio: float = field(
        default=0.1, metadata={"help": "Share of the steps without the term; 0 is the paper's equation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, found {self.rho}")
        if not 0 <= self.proximal_warmup_ratio <= 1:
            raise ValueError(
                f"proximal_warmup_ratio must be within 0 and 1, found {self.proximal_warmup_ratio}"
            )


def add_proximal_gradient(
    weights: Sequence[Tensor], anchor: Sequence[Tensor], rho: float, scale: float = 1.0
) -> None:
    """w.grad += rho (w - anchor), for every w that has a gradient; `scale` is the loss scale of fp16.

    Exactly zero where w equals its anchor. Works alike on plain tensors and on shards (DTensor).
    """
    pairs = [(w, a) for w, a in zip(weights, anchor, strict=True) if w.grad is not None]
    if not pairs:
        return
    with torch.no_grad():
        drift = torch._foreach_sub([w for w, _ in pairs], [a for _, a in pairs])
        torch._foreach_add_([w.grad for w, _ in pairs], drift, alpha=rho * scale)


class LisaMixin(BSOMixin):
    """Adds the proximal term to BSO."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "Lisa cannot run under DeepSpeed yet: its optimizer steps inside backward, before the "
                "proximal gradient is added. Use DDP or FSDP2."
            )

    def proximal_active(self: Any, step: int) -> bool:
        """Whether the term acts at optimizer step `step` (counted from 0)."""
        return self.args.rho > 0 and step + 1 > self.args.proximal_warmup_ratio * self.args.max_steps

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step; after the last micro-batch, and before clipping, the proximal gradient."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.proximal_active(self.state.global_step):
            weights = list(trainable_parameters(self.model).values())
            add_proximal_gradient(weights, self.anchor, self.args.rho, gradient_scale(self.accelerator))
        return loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the penalty rho/2 ||w - w_switch||^2, which is not part of the logged loss."""
        if "loss" in logs and self.anchor is not None:
            active = self.proximal_active(self.state.global_step - 1)
            logs["proximal_penalty"] = (
                self.args.rho / 2 * float(squared_norm(self.drift())) if active else 0.0
            )
        super().log(logs, *args, **kwargs)

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """That of BSO, with rho and the warm-up."""
        return super().run_fingerprint() | {
            "rho": self.args.rho,
            "proximal_warmup_ratio": self.args.proximal_warmup_ratio,
        }


class LisaTrainer(LisaMixin, RowTrainer):
    """Lisa on `transformers.Trainer`; `alignment_dataset` holds the rows of the alignment state."""


DEFENSE = Defense(
    name="lisa",
    label="Lisa",
    stages=("user",),
    paper="arXiv 2405.18641",
    needs=("alignment_dataset",),
    config=LisaConfig,
    trainer=LisaTrainer,
)
