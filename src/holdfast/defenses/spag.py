"""SPAG: a correcting step on the safe loss after each user step that raises it (ICML 2026, arXiv 2605.28030).

SPAG is the optimizer of SPARD. The user's optimizer step leads to theta+. If L_safe(theta+) > tau, then

    theta = theta+ - min( (L_safe(theta+) - tau) / ||g||^2, eta ) g,    g = grad L_safe(theta+)

L_safe is the cross-entropy on a batch of alignment rows, as large as an optimizer step. The length is that of
the step to where the linearised L_safe equals tau, and at most eta (the trust region). ||g|| is the norm over
all trainable weights together.

The paper's text was not read: the equation comes from notes on it, and the code was read. The notes do not
give eta; the default, 1, is the bound in the code. `form="code"` is what the authors' code does: it scales
the gradient of each tensor p by min((L_safe - tau) / ||g_p||, 1) and gives it to the optimizer (AdamW), which
divides by the gradient's size, so that mostly the gate tau acts. The published numbers come from the code.

Not built: the choice of safe rows by a determinantal point process (DPP). Give as many alignment rows as
3 % of the user rows, as in the paper. Dropout is off in the passes on the safe rows, so they draw no random
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from holdfast.defenses import Defense
from holdfast.errors import DataError
from holdfast.training.fisher import dropout_off
from holdfast.training.parameters import gradient_scale, squared_norm, trainable_parameters
from holdfast.training.passes import Means, gradients_aside, refuse_deepspeed, share_of_step, step_backward
from holdfast.training.penalty import AlignmentRows
from holdfast.training.private import foreach_add_
from holdfast.training.shards import drop_gathered
from holdfast.training.streams import step_batches
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class SPAGConfig(MethodConfig):
    """tau = 0.2 of the paper; eta = 1 of the authors' code."""

    tau: float = field(default=0.2, metadata={"help": "The safe loss above which a correction is made."})
    eta: float = field(default=1.0, metadata={"help": "Upper bound of the correction's step size."})
    form: Literal["paper", "code"] = field(
        default="paper",
        metadata={"help": "paper: the closed form; code: scaled gradients for the optimizer."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "eta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.form not in ("paper", "code"):
            raise ValueError(f"form must be paper or code, found {self.form!r}")
        if self.form == "code" and self.fp16:
            raise ValueError("form='code' takes a second optimizer step, which fp16 cannot scale. Use bf16")


def step_size(excess: float, squared: float, eta: float) -> float:
    """Return min(excess / ||g||^2, eta): the size of the correction for L_safe - tau = `excess` > 0."""
    return min(excess / squared, eta) if squared > 0 else 0.0


class _AfterTheStep(TrainerCallback):
    """Calls the trainer when the optimizer has taken its step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.correct(state.global_step)


class SPAGMixin(AlignmentRows):
    """Adds the correction to a `Trainer`; `alignment_dataset` holds the safe rows."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.alignment_dataset:
            raise DataError(f"{type(self).__name__} needs alignment_dataset: rows for the safe loss.")
        refuse_deepspeed(self)
        self._seen = Means()
        self.add_callback(_AfterTheStep(self))

    def correct(self: Any, step: int) -> None:
        """Measure the safe loss at theta+ and, if it exceeds tau, take the correcting step."""
        model, args = self.model_wrapped, self.args
        batches, items = step_batches(self, self.alignment_dataset, step, "alignment", "spag")

        def share(_: int, inputs: Any) -> Tensor:
            return share_of_step(self, model, inputs, items, len(batches))

        with dropout_off(self.model), self.unrecorded():
            with torch.no_grad():
                shares = torch.stack([share(i, batch) for i, batch in enumerate(batches)])
            loss = self.accelerator.reduce(shares.sum(), reduction="mean")
            drop_gathered(self.model)
            excess = float(loss) - args.tau
            self._seen.add(loss, torch.tensor(float(excess > 0), device=loss.device))
            if excess <= 0 or args.eta == 0:
                return
            weights: list[Tensor] = list(trainable_parameters(self.model).values())
            scale = gradient_scale(self.accelerator)
            with gradients_aside(weights):
                step_backward(self, model, batches, share, scale)
                gradients = [torch.zeros_like(w) if w.grad is None else w.grad / scale for w in weights]
                if args.form == "code":
                    self._optimizer_step(weights, gradients, excess)
        if args.form == "paper":
            squared = float(squared_norm(gradients))
            if squared < float("inf"):  # an overflow in fp16: no correction in this step
                with torch.no_grad():
                    foreach_add_(weights, gradients, alpha=-step_size(excess, squared, args.eta))

    def _optimizer_step(
        self: Any, weights: Sequence[Tensor], gradients: Sequence[Tensor], excess: float
    ) -> None:
        """The authors' code: the optimizer's own step with each tensor's gradient scaled by itself."""
        for weight, gradient in zip(weights, gradients, strict=True):
            norm = float(squared_norm([gradient]).sqrt())
            weight.grad = gradient * (min(excess / norm, 1.0) if norm > 0 else 0.0)
        self.optimizer.step()

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the safe loss after the user's step, and the share of steps that were corrected."""
        mean = self._seen.take() if "loss" in logs else None
        if mean is not None:
            logs["safe_loss"], logs["corrected"] = mean.tolist()
        super().log(logs, *args, **kwargs)


class SPAGTrainer(SPAGMixin, RowTrainer):
    """SPAG on `transformers.Trainer`; `alignment_dataset` holds the safe rows."""


DEFENSE = Defense(
    name="spag",
    label="SPAG",
    stages=("user",),
    paper="SPARD, ICML 2026, arXiv 2605.28030",
    needs=("alignment_dataset",),
    config=SPAGConfig,
    trainer=SPAGTrainer,
    series={"safe_loss": ("Loss", "safe rows"), "corrected": ("Corrected steps", "share")},
    strong={"tau": 0.05, "eta": 0.1},
    protocols={"lisa-code": {"user": {"tau": 0.2, "eta": 1.0}}},
)
