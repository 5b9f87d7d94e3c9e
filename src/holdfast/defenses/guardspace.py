"""GuardSpace: the update of a layer is zero on the inputs of harmful prompts (ICLR 2026, arXiv 2510.14301).

For each adapted linear layer, C = X X^T over the inputs X that harmful prompts give it, and

    W' = W + s B A P,    P = Q0 Q0^T

where Q0 holds the eigenvectors of C with an eigenvalue of (nearly) zero. So the update does not change what
the layer does to harmful prompts: B A P x = 0.

P is built into A: A becomes A P at the start and after every optimizer step. With Q, the other eigenvectors,
A P = A - (A Q) Q^T. The adapter stays a plain LoRA adapter of its rank, and nothing is left to apply when the
model is served.

"Nearly zero" is a share of energy here: the null space holds the eigenvectors with the smallest eigenvalues,
as many as together hold at most `tolerance` of the trace of C. With tolerance 0 it is the exact null space,
which is empty if the prompts have more independent inputs than the layer is wide. tolerance 1 is SFT (P = I).

The paper has no public code and its text was not read: the equations come from notes on it, which do not give
its tolerance or its prompts. Not built: its initialisation of A and B from the r smallest singular directions
of W C (without it, the paper reports a harmful score of 5.20 instead of 3.60 on GSM8K).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast.defenses import Defense
from holdfast.errors import DataError, ModelError
from holdfast.training.fisher import dropout_off
from holdfast.training.inputs import energetic_directions
from holdfast.training.passes import displaced, refuse_deepspeed
from holdfast.training.private import batch_size
from holdfast.training.proximal import lora_factors
from holdfast.training.questions import padded, questions
from holdfast.training.tokenising import rows_fingerprint
from holdfast.training.trainer import (
    MethodConfig,
    ResumableMixin,
    RowTrainer,
    drop_gathered,
    trainable_parameters,
)


@dataclass
class GuardSpaceConfig(MethodConfig):
    """The tolerance is ours: the notes on the paper do not give one."""

    tolerance: float = field(
        default=0.01, metadata={"help": "Share of the inputs' energy that the null space may hold, 0 to 1."}
    )
    prompts: int | None = field(
        default=None, metadata={"help": "Harmful prompts that the null space is computed from; default all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must be between 0 and 1, found {self.tolerance}")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts must be at least 1, found {self.prompts}")


class _AfterTheStep(TrainerCallback):
    """Calls the trainer when the optimizer has taken its step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.project()


class GuardSpaceMixin(ResumableMixin):
    """Projects the A of every adapted layer of a `Trainer`; `harmful_dataset` holds harmful questions.

    Rows may be of any accepted kind, with or without answers, which are not read.
    """

    def __init__(self: Any, *args: Any, harmful_dataset: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        found = questions(harmful_dataset or (), self.processing_class, self.args.max_length)
        if not found:
            raise DataError(f"{type(self).__name__} needs harmful_dataset: harmful questions.")
        self.harmful_prompts = found[: self.args.prompts]
        self.directions: dict[str, Tensor] | None = None
        refuse_deepspeed(self)
        self.check_model(self.args, self.model)
        self.add_callback(_AfterTheStep(self))

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuse anything other than a new adapter of plain LoRA on linear layers."""
        super().check_model(config, model)
        _factors(model)

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """The fingerprint of the parent class with the harmful prompts."""
        rows = [{"input_ids": prompt} for prompt in self.harmful_prompts]
        return super().run_fingerprint() | {"harmful_dataset": rows_fingerprint(rows)}

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train with null spaces of the current weights, also when the same trainer trains a second time."""
        self.directions = None
        return super().train(*args, **kwargs)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step; before the first one, the null spaces are computed."""
        if self.directions is None:
            self.directions = self._directions_now(model)
            if self.state.global_step == 0:  # the weights of a checkpoint are projected already
                self.project()
        return super().training_step(model, inputs, num_items_in_batch)

    def _directions_now(self: Any, model: Any) -> dict[str, Tensor]:
        """Return Q of each adapted layer, with B set to 0 meanwhile: after a resume they are those of before.

        Raises:
            ModelError: B is not 0 at the start, or no direction is left to train in any layer.
        """
        weights = list(trainable_parameters(self.model).values())
        factors = _factors(self.model)
        bs = [weights[f.b] for f in factors]
        if self.state.global_step == 0 and any(bool(_local(b).any()) for b in bs):
            raise ModelError(
                f"{type(self).__name__} needs a new adapter, whose B is 0: it keeps the update B A at zero "
                "on harmful prompts, and this adapter already has one. Train a new adapter on top of it."
            )
        size, pad = batch_size(self), getattr(self.processing_class, "pad_token_id", None) or 0
        prompts = sorted(self.harmful_prompts, key=len)
        batches = [padded(prompts[i : i + size], pad, self.args.device) for i in range(0, len(prompts), size)]

        def forward(batch: Any) -> None:
            with self.compute_loss_context_manager():
                model(**batch, use_cache=False)

        modules = {f.name: self.model.get_submodule(f.name) for f in factors}
        with dropout_off(self.model), displaced(bs, [b.detach().clone() for b in bs], -1.0):
            found = energetic_directions(self.model, modules, batches, forward, self.args.tolerance)
        drop_gathered(self.model)
        if all(q.shape[0] == q.shape[1] for q in found.values()):
            raise ModelError(
                f"No direction is left to train: {len(prompts)} harmful prompts reach every input direction "
                f"of every layer with tolerance={self.args.tolerance}. Raise it, or give fewer prompts."
            )
        return found

    @torch.no_grad()
    def project(self: Any) -> None:
        """A <- A - (A Q) Q^T in every adapted layer."""
        weights = list(trainable_parameters(self.model).values())
        for factor in _factors(self.model):
            a, q = _local(weights[factor.a]), self.directions[factor.name]
            if q.shape[1]:
                a.copy_(a.float() - (a.float() @ q) @ q.mT)

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """The mean share of input directions that the update may use."""
        spaces = (self.directions or {}).values()
        left = [1 - q.shape[1] / q.shape[0] for q in spaces]
        return super().reported(steps) | {"null_space": sum(left) / len(left) if left else None}


def _factors(model: nn.Module) -> Any:
    """Return the LoRA factors of `model`; ModelError if something else is trainable."""
    return lora_factors(
        model, trainable_parameters(model), method="GuardSpace", otherwise="Use other LoRA options."
    )


def _local(weight: Tensor) -> Any:
    """Return this process's rows of a weight: FSDP2 shards A by rows, and a projection acts on each alone."""
    there: Any = weight
    return there.to_local() if hasattr(there, "to_local") else there


class GuardSpaceTrainer(GuardSpaceMixin, RowTrainer):
    """GuardSpace on `transformers.Trainer`; `harmful_dataset` holds harmful questions."""


DEFENSE = Defense(
    name="guardspace",
    label="GuardSpace",
    stages=("user",),
    paper="ICLR 2026, arXiv 2510.14301",
    needs=("harmful_dataset",),
    config=GuardSpaceConfig,
    trainer=GuardSpaceTrainer,
    facts={"null_space": "mean share of input directions left to train"},
    strong={"tolerance": 0.05},
    protocols={"lisa-code": {"data": {"alignment": {"harmful": {"size": 100}}}, "user": {"tolerance": 0.01}}},
)
