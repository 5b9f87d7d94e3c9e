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

`initialisation="subspace"` is the paper's second part. With W C = U S V^T, the r directions with the smallest
singular values matter least for harmful prompts. The adapter starts from them, and the rest of W is frozen:

    s B_0 A_0 = U_r U_r^T W P,    W' = (W - s B_0 A_0) + s B A P

U_r S_r V_r^T C^-1 is U_r U_r^T W, so C is not inverted. At the start, W' = W. The remainder W - s B_0 A_0 is
not written into the model: the saved adapter would then be wrong on the aligned model, which is what it is
merged with and repaired on, and quantised weights cannot be changed. Half of the adapter's rank holds the
difference instead. With B = [B_1, -B_0] and A = [A_1; A_0],

    B A = B_1 A_1 - B_0 A_0

B_1 and A_1 start as B_0 and A_0 and are trained; the second halves get no gradient and keep their values. So
the paper's r is half of the LoRA's r, and every checkpoint is a plain LoRA adapter of the aligned model.

The paper has no public code and its text was not read: the equations come from notes on it. They do not give
its tolerance, its prompts, how B_0 and A_0 share the singular values, and what is done if C has no inverse.
Here both get the roots of the singular values of B_0 A_0, so that the scale of C does not matter. U_r is that
of W (C + 0.01 mean(diag C) I), as in PEFT's CorDA; otherwise it is arbitrary in the null space of C.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast.defenses import Defense
from holdfast.errors import DataError, ModelError
from holdfast.training.fisher import dropout_off
from holdfast.training.inputs import energetic_directions
from holdfast.training.parameters import trainable_parameters
from holdfast.training.passes import displaced, refuse_deepspeed
from holdfast.training.private import batch_size
from holdfast.training.proximal import lora_factors, sharded_like, whole
from holdfast.training.questions import padded, questions
from holdfast.training.resuming import ResumableMixin
from holdfast.training.shards import drop_gathered
from holdfast.training.tokenising import rows_fingerprint
from holdfast.training.trainer import MethodConfig, RowTrainer

DAMPING = 0.01
"""Share of the mean of C's diagonal that is added to it before the smallest directions are chosen."""


@dataclass
class GuardSpaceConfig(MethodConfig):
    """The tolerance is ours: the notes on the paper do not give one."""

    tolerance: float = field(
        default=0.01, metadata={"help": "Share of the inputs' energy that the null space may hold, 0 to 1."}
    )
    prompts: int | None = field(
        default=None, metadata={"help": "Harmful prompts that the null space is computed from; default all."}
    )

    initialisation: Literal["lora", "subspace"] = field(
        default="lora",
        metadata={
            "help": "lora: the adapter starts at zero; subspace: half of its rank starts from the directions "
            "of the weights that matter least for harmful prompts."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initialisation not in ("lora", "subspace"):
            raise ValueError(f"initialisation must be lora or subspace, found {self.initialisation!r}")
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
        self.fixed: list[tuple[Tensor, Tensor, Tensor]] = []
        refuse_deepspeed(self)
        self.check_model(self.args, self.model)
        self.add_callback(_AfterTheStep(self))

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuse anything other than a new adapter of plain LoRA on linear layers, with a rank to halve."""
        super().check_model(config, model)
        factors, weights = _factors(model), list(trainable_parameters(model).values())
        for factor in factors if config.initialisation == "subspace" else ():
            rank, half = weights[factor.a].shape[0], weights[factor.a].shape[0] // 2
            most = min(weights[factor.a].shape[1], weights[factor.b].shape[0])
            if rank % 2 or half > most:
                raise ModelError(
                    f"GuardSpace with initialisation='subspace' keeps the start in half of the LoRA rank, so "
                    f"it needs an even rank of at most {2 * most} for {factor.name}, found {rank}."
                )

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """The fingerprint of the parent class with the harmful prompts."""
        rows = [{"input_ids": prompt} for prompt in self.harmful_prompts]
        return super().run_fingerprint() | {"harmful_dataset": rows_fingerprint(rows)}

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train with null spaces of the current weights, also when the same trainer trains a second time."""
        self.directions, self.fixed = None, []
        return super().train(*args, **kwargs)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step; before the first one, the null spaces are computed."""
        if self.directions is None:
            self.directions = self._directions_now(model)
            if self.state.global_step == 0:  # the weights of a checkpoint are projected already
                self.project()
            if self.args.initialisation == "subspace":
                self.fixed = _second_half(self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # before clipping, whose norm they would change
            for weight, mask, _ in self.fixed:
                if weight.grad is not None:
                    _local(weight.grad).masked_fill_(mask, 0.0)
        return loss

    def _directions_now(self: Any, model: Any) -> dict[str, Tensor]:
        """Return Q of each adapted layer, with B set to 0 meanwhile: after a resume they are those of before.

        At the start of a training, also set the adapter to its initial values.

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
        starts: dict[str, tuple[Tensor, Tensor]] = {}

        def start(name: str, covariance: Tensor, q: Tensor) -> None:
            factor = next(f for f in factors if f.name == name)
            rank, weight = weights[factor.a].shape[0] // 2, _weight_below(modules[name])
            starts[name] = smallest_part(weight, covariance, q, rank, factor.scaling)

        first = self.args.initialisation == "subspace" and self.state.global_step == 0
        with dropout_off(self.model), displaced(bs, [b.detach().clone() for b in bs], -1.0):
            found = energetic_directions(
                self.model, modules, batches, forward, self.args.tolerance, start if first else None
            )
        drop_gathered(self.model)
        if all(q.shape[0] == q.shape[1] for q in found.values()):
            raise ModelError(
                f"No direction is left to train: {len(prompts)} harmful prompts reach every input direction "
                f"of every layer with tolerance={self.args.tolerance}. Raise it, or give fewer prompts."
            )
        for factor in factors if first else ():
            b, a = starts[factor.name]
            _set(weights[factor.b], torch.cat([b, -b], dim=1))
            _set(weights[factor.a], torch.cat([a, a], dim=0))
        return found

    @torch.no_grad()
    def project(self: Any) -> None:
        """A <- A - (A Q) Q^T in every adapted layer; the half that holds the start is left as it is."""
        weights = list(trainable_parameters(self.model).values())
        for factor in _factors(self.model):
            a, q = _local(weights[factor.a]), self.directions[factor.name]
            if q.shape[1]:
                a.copy_(a.float() - (a.float() @ q) @ q.mT)
        for weight, mask, value in self.fixed:
            _local(weight).copy_(torch.where(mask, value, _local(weight)))

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """The mean share of input directions that the update may use."""
        spaces = (self.directions or {}).values()
        left = [1 - q.shape[1] / q.shape[0] for q in spaces]
        return super().reported(steps) | {"null_space": sum(left) / len(left) if left else None}


@torch.no_grad()
def smallest_part(
    weight: Tensor, covariance: Tensor, q: Tensor, rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return B_0 [out, rank] and A_0 [rank, in] with s B_0 A_0 = U_r U_r^T W P, in float64.

    Args:
        weight: W [out, in].
        covariance: C [in, in]; U_r are the last `rank` left singular vectors of W C, C with `DAMPING`.
        q: Q [in, m], with P = I - Q Q^T.
        scaling: s.
    """
    w, q = weight.double(), q.double()
    damping = DAMPING * covariance.diagonal().mean()
    damped = covariance.double() + damping * torch.eye(len(covariance), dtype=w.dtype, device=w.device)
    u = torch.linalg.svd(w @ damped, full_matrices=False)[0][:, -rank:]
    part = u.mT @ w
    part = part - (part @ q) @ q.mT
    left, sizes, right = torch.linalg.svd(part / scaling, full_matrices=False)
    root = sizes.sqrt()
    return (u @ left) * root, root[:, None] * right


@torch.no_grad()
def _weight_below(module: Any) -> Tensor:
    """Return the weight [out, in] that a LoRA module adds to: its layer's, with the frozen adapters below."""
    weight = whole(dequantize_module_weight(module.get_base_layer())).double()
    weight = weight.mT if getattr(module, "fan_in_fan_out", False) else weight
    for name in module.active_adapters:
        if name in module.lora_A and not module.lora_A[name].weight.requires_grad:
            b, a = whole(module.lora_B[name].weight).double(), whole(module.lora_A[name].weight).double()
            weight = weight + module.scaling[name] * (b @ a)
    return weight


@torch.no_grad()
def _second_half(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each factor, the mask of the half of its rank that holds the start, and its values now."""
    weights = list(trainable_parameters(model).values())
    found = []
    for factor in _factors(model):
        rank = weights[factor.a].shape[0]
        second = torch.arange(rank) >= rank // 2
        for weight, mask in ((weights[factor.b], second), (weights[factor.a], second[:, None])):
            mine = _local(sharded_like(mask.expand(weight.shape).contiguous().to(weight.device), weight))
            found.append((weight, mine, _local(weight).detach().clone()))
    return found


def _set(weight: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(sharded_like(values.to(weight.device, weight.dtype), weight))


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
    protocols={
        "lisa-code": {"data": {"alignment": {"harmful": {"size": 100}}}, "user": {"tolerance": 0.01}},
        # Its published numbers are in AsFT's protocol: 8 trained directions and alpha / r = 4.
        "asft": {
            "user": {
                "tolerance": 0.01,
                "prompts": 100,
                "initialisation": "subspace",
                "lora": {"r": 16, "alpha": 64, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
            },
        },
    },
)
