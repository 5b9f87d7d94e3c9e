"""AsFT: fine-tuning is penalised for leaving the direction of the alignment (AAAI 2026, arXiv 2506.08473).

For each adapted module with update dW = (alpha / r) B A and V = W_aligned - W_base, with C = V V^T / ||V||_F,

    min  CE(user rows) + lambda sum over modules ||(I - C) dW||_F^2

C is Safe LoRA's, and no matrix of size out x out is built here either. With P = (I - C) B, the penalty is s^2
tr(P^T P A A^T), and its gradient is

    2 s^2 (I - C) P A A^T  for B,    2 s^2 P^T P A  for A

dW is the change since the start of training: P Q with P = [B, B - B_0] and Q = [A - A_0; A_0]. So an adapter
that continues the alignment's, or does not start at B = 0, is penalised for what it adds.

A step costs four products of V with 2 r columns. If the alignment is an adapter, V = L R is not built: C x is
L (R R^T) L^T x / ||V||_F. V is read once, by Safe LoRA's reader, and stays in memory in the dtype of the
aligned weights. A module that the alignment did not change has no direction and no penalty.

`scaling` says which of two penalties is used: "paper" has s = alpha / r, as above. "code" has s = 1, as the
authors' code, which leaves alpha / r out; with their alpha / r of 4, its lambda is 16 times smaller in the
paper's equation. The published numbers come from the code, with lambda = 1.

Where we differ from the authors' code, and why:

- it adds the penalty to the loss of every micro-batch, after the division by gradient accumulation, so that
  lambda grows with accumulation. Here its gradient is added once per optimizer step, before clipping;
- it builds a matrix of size out x out for each module, and pairs these with the adapter by position.

I - C is not a projector in either: C has the eigenvalues sigma_i^2 / ||V||_F, which are small for a small V
and above 1 for a large one. The paper's text was not read in whole: the equation comes from notes and the
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.defenses import Defense, Planned
from holdfast.defenses.safe_lora_parts.directions import (
    Found,
    identify,
    modules_with_direction,
    read_directions,
)
from holdfast.errors import DataError
from holdfast.training.parameters import trainable_parameters
from holdfast.training.penalty import PenaltyMixin
from holdfast.training.private import WRAPPERS
from holdfast.training.proximal import Factors, Tensors, lora_factors, sharded_like, split_change, whole
from holdfast.training.trainer import MethodConfig, RowTrainer

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes in which V is kept; float32 for any other."""


@dataclass
class AsFTConfig(MethodConfig):
    """lambda = 1 is the authors' setting, with `scaling="code"`."""

    lambda_: float = field(default=1.0, metadata={"help": "Strength of the penalty."})
    scaling: Literal["paper", "code"] = field(
        default="paper", metadata={"help": "paper: dW = (alpha / r) B A; code: dW = B A."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_ < 0:
            raise ValueError(f"lambda_ must not be negative, found {self.lambda_}")
        if self.scaling not in ("paper", "code"):
            raise ValueError(f"scaling must be paper or code, found {self.scaling!r}")


@dataclass(frozen=True, eq=False)
class Direction:
    """C = L G L^T of one module: L is V (out x in) or an adapter's B, G = R R^T / ||V||_F with V = L R."""

    left: Tensor
    gram: Tensor | None
    norm: float

    @classmethod
    def of(cls, found: Found, device: Any) -> Direction:
        """Return C of V on a device."""
        left = torch.from_numpy(found.left).to(device)
        if found.right is None:
            return cls(left.to(DTYPES.get(found.dtype, torch.float32)), None, float(left.norm()))
        right = torch.from_numpy(found.right).to(device)
        gram = right @ right.mT
        norm = float(((left.mT @ left) * gram).sum().clamp(min=0).sqrt())
        return cls(left, gram / (norm or 1.0), norm)

    def away(self, x: Tensor) -> Tensor:
        """(I - C) x."""
        left = self.left.to(x.dtype)
        inner = left.mT @ x
        return x - left @ (inner / self.norm if self.gram is None else self.gram.to(x.dtype) @ inner)


@dataclass(frozen=True, eq=False)
class OutsideDirection:
    """D = 1/2 sum over modules s^2 ||(I - C)(B A - B_a A_a)||_F^2; see `training/proximal.py`."""

    modules: Sequence[tuple[Factors, Direction, float]]

    def value(self, weights: Tensors, anchor: Tensors) -> Tensor:
        """D, a scalar in float32."""
        total = torch.zeros((), device=weights[0].device)
        for module, direction, scaling in self.modules:
            p, q = (part.float() for part in split_change(module, *_whole(module, weights, anchor)))
            p = direction.away(p)
            total += scaling**2 / 2 * ((p.mT @ p) * (q @ q.mT)).sum()
        return total

    def gradient(self, weights: Tensors, anchor: Tensors) -> list[Tensor]:
        """dD/dw: with P Q = B A - B_a A_a and N = (I - C)^2, s^2 N P (Q A^T) for B, s^2 (B^T N P) Q for A."""
        found: dict[int, Tensor] = {}
        for module, direction, scaling in self.modules:
            now, start = _whole(module, weights, anchor)
            p, q = (part.float() for part in split_change(module, now, start))
            p = scaling**2 * direction.away(direction.away(p))
            found[module.b] = p @ (q @ now[module.a].float().mT)
            found[module.a] = (now[module.b].float().mT @ p) @ q
        return [
            sharded_like(found[i].to(w.dtype), w) if i in found else torch.zeros_like(w)
            for i, w in enumerate(weights)
        ]


def _whole(module: Factors, weights: Tensors, anchor: Tensors) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The module's factors and those of the anchor by position, gathered from all processes."""
    now, start = ({i: whole(part[i].detach()) for i in (module.b, module.a)} for part in (weights, anchor))
    return now, start


class AsFTMixin(PenaltyMixin):
    """Adds the gradient of the penalty to that of a `Trainer`, once per optimizer step and before clipping.

    `aligned` is the folder of the aligned model, or of an alignment adapter. `base` is that of the model
    before alignment, which an adapter does not need. The model to train must be the aligned one.
    """

    def __init__(self: Any, *args: Any, base: Any = None, aligned: Any = None, **kwargs: Any):
        self.base, self.aligned = base, aligned
        self._directions: dict[str, Direction] | None = None
        super().__init__(*args, **kwargs)
        if self.penalised(self.args) and aligned is None:
            raise DataError(
                f"{type(self).__name__} needs aligned: the folder of the aligned model, with base, or of an "
                "alignment adapter."
            )

    @staticmethod
    def penalty_term(config: Any) -> str:
        """The name of the term, for errors."""
        return "asft"

    @staticmethod
    def penalised(config: Any) -> bool:
        """Without lambda, AsFT is SFT."""
        return config.lambda_ > 0

    def penalty_strength(self: Any, step: int) -> float:
        """2 lambda, at every step: D has a factor 1/2."""
        return 2 * self.args.lambda_

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuse anything other than plain LoRA on linear layers."""
        super().check_model(config, model)
        if cls.penalised(config):
            _factors(model)

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """The fingerprint of the parent class with that of the weights that V comes from."""
        known = identify(self.base, self.aligned) if self.penalised(self.args) else None
        return super().run_fingerprint() | {"direction": known}

    def _build_term(self: Any) -> None:
        """Read V of every adapted module, once."""
        if not self.penalised(self.args):
            return
        factors = {_base_name(module.name): module for module in _factors(self.model)}
        if self._directions is None:
            stored = {
                name: self.model.get_submodule(module.name).fan_in_fan_out for name, module in factors.items()
            }
            read = read_directions(stored, self.base, self.aligned)
            made = ((found.name, Direction.of(found, self.args.device)) for found in read)
            self._directions = {name: direction for name, direction in made if direction.norm > 0}
        paper = self.args.scaling == "paper"
        self.term = OutsideDirection(
            [
                (factors[name], direction, factors[name].scaling if paper else 1.0)
                for name, direction in self._directions.items()
            ]
        )

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """The number of modules whose update is penalised."""
        return super().reported(steps) | {"directions": len(self._directions or ())}


def _factors(model: nn.Module) -> list[Factors]:
    """Return the LoRA factors of `model`; ModelError if something else is trainable."""
    return lora_factors(
        model, trainable_parameters(model), method="AsFT", otherwise="Use other LoRA options."
    )


def _base_name(module: str) -> str:
    """Return the name of an adapted module in the base model."""
    for wrapper in WRAPPERS:
        module = module.replace(wrapper, "")
    return module.removeprefix("base_model.model.")


class AsFTTrainer(AsFTMixin, RowTrainer):
    """AsFT on `transformers.Trainer`; `base` and `aligned` are the folders that V is read from."""


def check(planned: Planned, **parameters: Any) -> None:
    """Check before training that modules of the user's LoRA have a direction."""
    modules_with_direction(planned)


DEFENSE = Defense(
    name="asft",
    label="AsFT",
    stages=("user",),
    paper="AAAI 2026, arXiv 2506.08473",
    needs=("base", "aligned"),
    config=AsFTConfig,
    trainer=AsFTTrainer,
    check=check,
    series={"penalty": ("Penalty", "outside the direction")},
    facts={"directions": "modules whose update is penalised"},
    strong={"lambda_": 25.0},
    protocols={
        "lisa-code": {"user": {"lambda_": 1.0, "scaling": "code"}},
        "asft": {"user": {"lambda_": 1.0, "scaling": "code", "base": "meta-llama/Llama-2-7b-hf"}},
    },
)
