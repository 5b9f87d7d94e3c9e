"""Lisa (lazy safety alignment): BSO with a proximal term (arXiv 2405.18641, Algorithm 1).

In each state the loss is f(w) + rho/2 ||w - w_switch||^2, where w_switch are the weights at the last switch
point, that is, at the end of the other state. Its gradient is that of f plus rho (w - w_switch).

Where we differ from the authors' code, and why:

- the gradient of the term is added once per optimizer step, before clipping, instead of adding the term to
  every micro-batch's loss: the numbers are the same, but rho does not grow with gradient accumulation, and
  `eval_loss` does not contain the term;
- one anchor instead of two: in each phase it is the weights at the last switch point, so the second copy is
  never read;
- the term is left out while the optimizer step (from 0) is at most `proximal_warmup_ratio` times all steps.
  0.1 is the authors' code; 0 is the paper's equation, with the term in every step.

rho acts on the trainable weights. For LoRA these are the factors A and B, so its strength depends on rank,
alpha and the number of modules, and does not transfer from one set-up to another. There are two other terms,
`proximal`:

- `fisher`: rho/2 sum_i F_i (w_i - w_switch,i)^2, where F is the diagonal Fisher information of `fisher_rows`
  alignment rows at the weights of the switch point, divided by its mean over all trainable weights (F = 1 is
  `l2`). It is computed again at each switch point: a fresh LoRA has B = 0, and so F = 0 on all of A;
- `delta_w`: rho/2 sum over modules ||s B A - s B_switch A_switch||_F^2, where s is the scaling of LoRA: the
  distance between the LoRA updates, not between their factors. `proximal.py` has the equations of all three.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.defenses import Defense
from holdfast.defenses.bso import BSOConfig, BSOMixin
from holdfast.training.penalty import PenaltyMixin
from holdfast.training.trainer import RowTrainer


@dataclass
class LisaConfig(BSOConfig):
    """Defaults of the paper: K1 = 100, K2 = 900, rho = 1 (section 5.1); the warm-up is that of the code."""

    rho: float = field(default=1.0, metadata={"help": "Strength of the proximal term."})
    proximal_warmup_ratio: float = field(
        default=0.1, metadata={"help": "Share of the steps without the term; 0 is the paper's equation."}
    )
    proximal: Literal["l2", "fisher", "delta_w"] = field(
        default="l2", metadata={"help": "The term's distance: of weights, weights weighted by F, or B A."}
    )
    fisher_rows: int = field(
        default=256, metadata={"help": "Alignment rows that F is computed from at each switch point."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, found {self.rho}")
        if not 0 <= self.proximal_warmup_ratio <= 1:
            raise ValueError(
                f"proximal_warmup_ratio must be within 0 and 1, found {self.proximal_warmup_ratio}"
            )
        if self.proximal not in ("l2", "fisher", "delta_w"):
            raise ValueError(f"proximal must be l2, fisher or delta_w, found {self.proximal!r}")
        if self.fisher_rows < 1:
            raise ValueError(f"fisher_rows must be at least 1, found {self.fisher_rows}")


class LisaMixin(PenaltyMixin, BSOMixin):
    """Adds the proximal term to BSO."""

    fisher_has_mean_1 = True

    @staticmethod
    def penalty_term(config: Any) -> str:
        """The proximal term."""
        return config.proximal

    @staticmethod
    def penalised(config: Any) -> bool:
        """Without rho, Lisa is BSO."""
        return config.rho > 0

    def penalty_strength(self: Any, step: int) -> float:
        """rho, after the warm-up."""
        warmup = self.args.proximal_warmup_ratio * self.state.max_steps
        return 0.0 if warmup and step <= warmup else self.args.rho


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
    series={
        "alignment_loss": ("Loss", "alignment rows"),
        "user_loss": ("Loss", "user rows"),
        "drift": ("Drift", "drift"),
    },
    facts={
        "alignment_steps": "optimizer steps of an alignment phase",
        "finetune_steps": "optimizer steps of a user phase",
        "switch_points": "optimizer steps that begin a phase",
        "adjusted": "settings that a short run scales, each as [asked, used]; null without any",
    },
    strong={"alignment_steps": 3, "finetune_steps": 4, "rho": 5.0, "proximal_warmup_ratio": 0.0},
    protocols={
        "world": {"user": {"alignment_steps": 10, "finetune_steps": 90}},
        "smollm2": {"user": {"alignment_steps": 4, "finetune_steps": 36}},
        "lisa-code": {"user": {"alignment_steps": 100, "finetune_steps": 900, "rho": 1.0}},
        # The paper and the guide apply the term from the first step.
        "lisa-paper": {
            "user": {
                "alignment_steps": 100,
                "finetune_steps": 900,
                "rho": 1.0,
                "proximal_warmup_ratio": 0.0,
            }
        },
        "lisa-guide": {
            "user": {
                "alignment_steps": 100,
                "finetune_steps": 900,
                "rho": 1.0,
                "proximal_warmup_ratio": 0.0,
            }
        },
        "booster": {"user": {"alignment_steps": 100, "finetune_steps": 900, "rho": 0.01}},
        "anchoring": {"user": {"alignment_steps": 100, "finetune_steps": 900, "rho": 1.0}},
        "filter": {"user": {"alignment_steps": 100, "finetune_steps": 900, "rho": 1.0}},
    },
)
