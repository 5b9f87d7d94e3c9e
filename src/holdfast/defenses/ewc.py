"""EWC (elastic weight consolidation): fine-tuning stays near the start where alignment rows are sensitive.

The loss is f(w) + lambda sum_i F_i (w_i - w*_i)^2, where f is the cross-entropy on the user's rows, w* are
the weights at the start and F is the diagonal Fisher information of the alignment rows at w*. It is a
baseline of Lisa (arXiv 2405.18641), and lambda has the convention of its authors' code. The paper of EWC
(Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3) has lambda/2 there: its lambda is twice `lambda_`.

The description and the code of Lisa's authors differ; both versions are here:

- `penalty="fisher"`, their code: F is the sum of the squared gradients of the batches of alignment rows
  (10,000 there), lambda 0.001. F grows with the number of batches, so lambda does not transfer;
- `penalty="l2"`, their text: F = 1, lambda ||w - w*||^2, the plain distance to the aligned weights.

It trains the alignment adapter itself (single LoRA), so that w* are the aligned weights. In a new adapter B =
0 at the start, and so F = 0 on all of A. Unlike in the authors' code, the gradients that F is computed from
never enter the first step, F is computed with dropout off, and the penalty is added once per optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.defenses import Defense
from holdfast.training.penalty import AlignmentRows, PenaltyMixin
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class EWCConfig(MethodConfig):
    """lambda of the Lisa authors' code, called `lambda_` because lambda is a Python keyword."""

    lambda_: float = field(default=0.001, metadata={"help": "lambda in lambda sum F (w - w*)^2."})
    penalty: Literal["fisher", "l2"] = field(
        default="fisher", metadata={"help": "fisher: weight the distance by the Fisher information; l2: not."}
    )
    fisher_rows: int | None = field(
        default=None, metadata={"help": "Alignment rows that F is computed from; by default all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_ < 0:
            raise ValueError(f"lambda_ must not be negative, found {self.lambda_}")
        if self.penalty not in ("fisher", "l2"):
            raise ValueError(f"penalty must be fisher or l2, found {self.penalty!r}")
        if self.fisher_rows is not None and self.fisher_rows < 1:
            raise ValueError(f"fisher_rows must be at least 1, found {self.fisher_rows}")


class EWCMixin(PenaltyMixin, AlignmentRows):
    """Adds the penalty to a `Trainer`; w* and F are computed before the first step."""

    @staticmethod
    def penalty_term(config: Any) -> str:
        """F of the alignment rows, or F = 1."""
        return config.penalty

    @staticmethod
    def penalised(config: Any) -> bool:
        """Without lambda, EWC is SFT."""
        return config.lambda_ > 0

    def penalty_strength(self: Any, step: int) -> float:
        """2 lambda, at every step: the terms of `proximal.py` hold a factor 1/2."""
        return 2 * self.args.lambda_


class EWCTrainer(EWCMixin, RowTrainer):
    """EWC on `transformers.Trainer`; `alignment_dataset` holds the rows that F is computed from."""


DEFENSE = Defense(
    name="ewc",
    label="EWC",
    stages=("user",),
    paper="Kirkpatrick et al. 2017, arXiv 1612.00796",
    needs=("alignment_dataset",),
    adapter="continue",
    config=EWCConfig,
    trainer=EWCTrainer,
    series={"drift": ("Drift", "drift")},
    strong={"lambda_": 25.0},
    protocols={"lisa-code": {"user": {"lambda_": 0.001}}, "world": {"user": {"lambda_": 5e5}}},
)
