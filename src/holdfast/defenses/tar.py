"""TAR (tampering attack resistance): training through simulated attacks (Tamirisa et al., arXiv 2408.00761).

    min over theta of   L_LM(theta) + lambda_retain ||h_theta - h_G||^2
                        + lambda_TR E_attack[ L_TR(attack(theta)) ]

Every optimizer step draws an adversary, which fine-tunes the trainable weights theta on harmful rows for K
steps of AdamW. At every `inner_subsample`-th adversary step the gradient of L_TR is computed, and the
weighted sum of these gradients is added to the gradient at theta itself (first-order meta-learning). Then
theta is restored, bit for bit.

- L_TR for the refusal of harmful requests is DPO: a refusal is preferred to a harmful answer, with the
  starting model G as reference. `entropy` is the paper's other loss, for knowledge that the model must not
  regain.
- L_LM is cross-entropy on `train_dataset`, which replaces the paper's retain data; h are the hidden states of
  the model and of G at the same tokens.

Where we differ from the authors' code, and why: G is a copy of the trainable weights and not a second model;
lambda_retain multiplies only the hidden states, so that both lambdas at 0 are SFT (at the paper's 1 there is
no difference); padding and questions are left out of every mean, and the mean is over the whole optimizer
step; the attack has no dropout and no NEFTune noise, and G gets those of theta, so that h_theta = h_G where
theta = G; a harmful row whose question has no refusal is paired with that of another
question.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from holdfast.defenses import Defense
from holdfast.errors import InputError
from holdfast.training import tampering as tamper
from holdfast.training.harmful_rows import HarmfulRows
from holdfast.training.parameters import gradient_scale
from holdfast.training.penalty import AnchorMixin
from holdfast.training.perturbation import same_random_numbers
from holdfast.training.proximal import add_gradient
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class TARConfig(MethodConfig):
    """Defaults of the paper for the refusal of harmful requests (Table 12), and of the authors' code."""

    inner_steps: int = field(default=64, metadata={"help": "K: the adversary's optimizer steps."})
    inner_subsample: int = field(
        default=4, metadata={"help": "L_TR is computed at every k-th adversary step."}
    )
    schedule_lambda: float = field(
        default=0.0625, metadata={"help": "L_TR at step k has weight exp(schedule_lambda (k - K))."}
    )
    adversary_learning_rates: str = field(
        default="2e-6, 2e-5, 4e-5", metadata={"help": "One learning rate of AdamW is drawn per attack."}
    )
    lambda_tr: float = field(default=0.1, metadata={"help": "Strength of L_TR; 0 simulates no attack."})
    lambda_retain: float = field(
        default=1.0, metadata={"help": "Strength that keeps hidden states close to those at the start."}
    )
    tamper_resistance: Literal["dpo", "entropy"] = field(
        default="dpo", metadata={"help": "L_TR: DPO for refusal, negative entropy for knowledge."}
    )
    dpo_beta: float = field(default=0.1, metadata={"help": "beta of DPO."})
    representation: Literal["squared", "norm"] = field(
        default="squared", metadata={"help": "The paper's squared distance, or the code's plain distance."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_tr", "lambda_retain", "schedule_lambda"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.dpo_beta <= 0:
            raise ValueError(f"dpo_beta must be above 0, found {self.dpo_beta}")
        if not 1 <= self.inner_subsample <= self.inner_steps:
            raise ValueError(
                f"inner_subsample must be within 1 and inner_steps={self.inner_steps}, found "
                f"{self.inner_subsample}: otherwise L_TR is never computed"
            )
        if self.tamper_resistance not in ("dpo", "entropy"):
            raise ValueError(f"tamper_resistance must be dpo or entropy, found {self.tamper_resistance!r}")
        if self.representation not in ("squared", "norm"):
            raise ValueError(f"representation must be squared or norm, found {self.representation!r}")
        self.learning_rates()

    def learning_rates(self) -> list[float]:
        """`adversary_learning_rates` as numbers."""
        try:
            rates = [float(rate) for rate in self.adversary_learning_rates.split(",")]
        except (AttributeError, ValueError):
            rates = []
        if not rates or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(
                "adversary_learning_rates must be finite numbers separated by commas, such as "
                f"'2e-6, 2e-5', found {self.adversary_learning_rates!r}"
            )
        return rates


class TARMixin(HarmfulRows, AnchorMixin):
    """Adds simulated attacks and the retain term to a `Trainer`; its anchor is the starting model G."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InputError(
                f"{type(self).__name__} cannot run under DeepSpeed, whose optimizer steps inside backward: "
                "no attack can be simulated. Use DDP or FSDP2."
            )
        if self.args.tamper_resistance == "dpo" and getattr(self.args, "packing", False):
            raise InputError("DPO pairs rows, but a packed row holds several. Set packing=False.")
        self._start_over()

    def _start_over(self: Any) -> None:
        self._meta_gradient: list[Tensor] = []
        self.partners: list[int] = []
        self._seen: dict[str, Tensor] = {}
        self._steps = 0

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train from a new starting model, also when the same trainer trains a second time."""
        self._start_over()
        return super().train(*args, **kwargs)

    def keep_anchor(self: Any) -> None:
        """At the start of a step, keep the starting weights and attack the current weights."""
        super().keep_anchor()
        self._steps += 1
        if self.args.lambda_tr:
            self._meta_gradient = self._attacked()

    def _attacked(self: Any) -> list[Tensor]:
        if not self.partners:
            refusals, seed = self.train_dataset, self.args.seed
            self.partners, same = tamper.partners(self.harmful_dataset, refusals, seed)
            text = "%d of %d harmful rows have a refusal of the same question"
            logging.getLogger(__name__).info(text, same, len(self.partners))
        attack = tamper.SimulatedAttack(self, self.model_wrapped, self.state.global_step)
        gradient = attack.gradient(self.weights, self.anchor)
        for name, share in attack.losses.items():
            self._count(name, share)
        return gradient

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step, plus the meta-gradient after the last micro-batch and before clipping."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._meta_gradient and self.accelerator.sync_gradients:
            strength = self.args.lambda_tr * gradient_scale(self.accelerator)
            add_gradient(self.weights, self._meta_gradient, strength)
            self._meta_gradient = []
        return loss

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L_LM + lambda_retain ||h - h_G||^2 over the tokens of the step; outside training the plain loss."""
        if not (self.args.lambda_retain and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_hidden_states": True}
        labels = inputs["labels"]
        with tamper.hidden_states(self.model) as seen:
            same = same_random_numbers(self.args.device)
            with same, tamper.borrowed(model, self.weights, self.anchor), torch.no_grad():
                model(**{k: v for k, v in inputs.items() if k != "labels"})
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if return_outputs else found
        start, now = seen[:2]
        squared = self.args.representation == "squared"
        distance = tamper.representation_distance(now, start, labels, squared)
        retain = distance.sum() / (distance.numel() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            retain = retain * self.accelerator.num_processes  # gradients are averaged over the processes
        share = 1 if num_items_in_batch is not None else 1 / self.current_gradient_accumulation_steps
        self._count("cross_entropy", share * loss)
        self._count("retain_loss", share * retain)
        loss = loss + self.args.lambda_retain * retain
        return (loss, found[1]) if return_outputs else loss

    def _count(self: Any, name: str, share: Tensor) -> None:
        self._seen[name] = self._seen.get(name, 0.0) + share.detach()

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add each term without its strength to the log: the mean over the steps since the last entry."""
        if "loss" in logs and self._steps:
            for name, total in self._seen.items():
                logs[name] = float(self.accelerator.reduce(total, reduction="mean")) / self._steps
            self._seen, self._steps = {}, 0
        super().log(logs, *args, **kwargs)


class TARTrainer(TARMixin, RowTrainer):
    """TAR on `transformers.Trainer`: refusals in `train_dataset`, rows of the attack in `harmful_dataset`."""


DEFENSE = Defense(
    name="tar",
    label="TAR",
    stages=("alignment",),
    paper="arXiv 2408.00761",
    needs=("harmful_dataset",),
    config=TARConfig,
    trainer=TARTrainer,
    series={"cross_entropy": ("Loss", "cross-entropy"), "retain_loss": ("Retain loss", "retain loss")},
    strong={
        "inner_steps": 2,
        "inner_subsample": 1,
        "adversary_learning_rates": "5e-3, 1e-2",
        "lambda_tr": 2.0,
        "lambda_retain": 0.4,
        "dpo_beta": 0.3,
    },
    # 750 steps as in the authors' scripts, each with an attack of 64 steps. Rows as in T-Vaccine's script.
    # In the world, attacks at rates that matter there; the paper's 2e-6 to 4e-5 change nothing in so small
    # a model. Nothing is retained of the start, which complies with everything; the authors' start refuses.
    protocols={
        "world": {
            "alignment": {
                "inner_steps": 8,
                "inner_subsample": 2,
                "adversary_learning_rates": "1e-4, 3e-4, 1e-3",
                "lambda_tr": 8,
                "lambda_retain": 0,
            },
        },
        "t-vaccine": {
            "data": {"alignment": {"harmful": {"size": 2000}}},
            "alignment": {"training": {"max_steps": 750}},
        },
    },
)
