"""Vaccine: alignment against the worst small perturbation of every layer's attention output.

Each step has two passes over the same rows (arXiv 2402.01109, Algorithm 1). The first pass computes the
gradients g_l of the loss at the attention output of each layer l. The second trains with

    epsilon_l = rho g_l / ||g||

added to these outputs, where ||g|| is the norm over all layers together. Where we differ from the authors'
code: the norm is that of the whole batch of an optimizer step, not of a micro-batch or a process; the first
pass does not change `.grad` (theirs clears it, and with it all earlier micro-batches of the step); both
passes see the same dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.defenses import Defense
from holdfast.training.perturbation import PerturbationMixin, refuse_reentrant
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class VaccineConfig(MethodConfig):
    """rho is the paper's; Table 6 of the paper goes from 0.01 to 10."""

    rho: float = field(
        default=2.0, metadata={"help": "Norm of the perturbation over all layers and the whole batch."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, found {self.rho}")
        refuse_reentrant(self)


class VaccineMixin(PerturbationMixin):
    """Perturbs the attention output of every layer, at every step."""


class VaccineTrainer(VaccineMixin, RowTrainer):
    """Vaccine on `transformers.Trainer`; `train_dataset` holds the alignment rows."""


DEFENSE = Defense(
    name="vaccine",
    label="Vaccine",
    stages=("alignment",),
    paper="Huang et al., NeurIPS 2024, arXiv 2402.01109",
    config=VaccineConfig,
    trainer=VaccineTrainer,
    strong={"rho": 5.0},
    protocols={
        "world": {"alignment": {"rho": 8}},
        "t-vaccine": {"alignment": {"rho": 2.0}},
        "vaccine": {"alignment": {"rho": 2.0}},
        "anchoring": {"alignment": {"rho": 2.0}},
    },
)
