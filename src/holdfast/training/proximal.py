"""Quadratic penalties on the distance of the weights w from an anchor a: values and gradients, on tensors.

===========  ==========================================  ======================================
term         value D(w, a)                               gradient
===========  ==========================================  ======================================
`L2`         1/2 ||w - a||^2                             w - a
`Weighted`   1/2 sum_i F_i (w_i - a_i)^2                 F (w - a)
`DeltaW`     1/2 sum_modules s^2 ||B A - B_a A_a||_F^2   s^2 (B A - B_a A_a) A^T  for B,
                                                         s^2 B^T (B A - B_a A_a)  for A
===========  ==========================================  ======================================

A method's penalty is its strength (rho, lambda) times D. A gradient is exactly zero where w equals a and has
no graph. Plain tensors and shards (DTensor) are both supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from holdfast.errors import ModelError
from holdfast.training.parameters import squared_norm
from holdfast.training.private import foreach_add_, foreach_mul, foreach_sqrt, foreach_sub

Tensors = Sequence[Tensor]


class Term(Protocol):
    """D(w, a); `weights` and `anchor` are lists of tensors of the same shapes."""

    def value(self, weights: Tensors, anchor: Tensors) -> Tensor:
        """D, a scalar in float32."""

    def gradient(self, weights: Tensors, anchor: Tensors) -> list[Tensor]:
        """dD/dw, one tensor per weight."""


class L2:
    """D = 1/2 ||w - a||^2 (Lisa, Algorithm 1)."""

    def value(self, weights: Tensors, anchor: Tensors) -> Tensor:
        """Half the squared distance."""
        return squared_norm(self.gradient(weights, anchor)) / 2

    def gradient(self, weights: Tensors, anchor: Tensors) -> list[Tensor]:
        """w - a."""
        return difference(weights, anchor)


@dataclass(frozen=True)
class Weighted:
    """D = 1/2 sum_i F_i (w_i - a_i)^2; F >= 0 has the shapes of the weights (Kirkpatrick et al. 2017)."""

    fisher: list[Tensor]

    def value(self, weights: Tensors, anchor: Tensors) -> Tensor:
        """Half the squared distance, with each coordinate weighted by F."""
        roots = foreach_sqrt(self.fisher)
        return squared_norm(list(foreach_mul(difference(weights, anchor), roots))) / 2

    def gradient(self, weights: Tensors, anchor: Tensors) -> list[Tensor]:
        """F (w - a)."""
        return list(foreach_mul(difference(weights, anchor), self.fisher))


@dataclass(frozen=True)
class Factors:
    """A LoRA module: positions of its B (out x r) and A (r x in) in the weights, its scaling s, its name."""

    b: int
    a: int
    scaling: float
    name: str = ""


@dataclass(frozen=True)
class DeltaW:
    """D = 1/2 sum s^2 ||B A - B_a A_a||_F^2: the distance between LoRA updates, not between factors.

    With P = [B, B - B_a] (out x 2r) and Q = [A - A_a; A_a] (2r x in) the difference is P Q. So one side of
    every product is at most 2r, and small differences are not computed by subtracting large numbers.
    """

    modules: Sequence[Factors]

    def value(self, weights: Tensors, anchor: Tensors) -> Tensor:
        """1/2 sum s^2 tr(P^T P Q Q^T)."""
        parts = []
        for module in self.modules:
            p, q = split_change(module, weights, anchor)
            part = module.scaling**2 / 2 * ((p.mT @ p).float() * (q @ q.mT).float()).sum()
            parts.append(part.full_tensor() if hasattr(part, "full_tensor") else part)
        return torch.stack(parts).sum()

    def gradient(self, weights: Tensors, anchor: Tensors) -> list[Tensor]:
        """s^2 P (Q A^T) for B, s^2 (B^T P) Q for A."""
        found: dict[int, Tensor] = {}
        for module in self.modules:
            b, a = weights[module.b].detach(), weights[module.a].detach()
            p, q = split_change(module, weights, anchor)
            found[module.b] = module.scaling**2 * (p @ (q @ a.mT))
            found[module.a] = module.scaling**2 * ((b.mT @ p) @ q)
        return [_placed_like(found[i], weight) for i, weight in enumerate(weights)]


def split_change(
    module: Factors, weights: Tensors | Mapping[int, Tensor], anchor: Tensors | Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return P (out x 2r) and Q (2r x in) with P Q = B A - B_a A_a."""
    b, b_anchor = weights[module.b].detach(), anchor[module.b]
    a, a_anchor = weights[module.a].detach(), anchor[module.a]
    return torch.cat([b, b - b_anchor], dim=1), torch.cat([a - a_anchor, a_anchor], dim=0)


def difference(weights: Tensors, anchor: Tensors) -> list[Tensor]:
    """w - a."""
    with torch.no_grad():
        return list(foreach_sub(list(weights), list(anchor)))


def add_gradient(weights: Sequence[Tensor], gradient: Tensors, strength: float) -> None:
    """w.grad += strength * gradient, for every w that has a gradient."""
    pairs = [(w.grad, g) for w, g in zip(weights, gradient, strict=True) if w.grad is not None]
    if pairs:
        with torch.no_grad():
            foreach_add_([own for own, _ in pairs], [g for _, g in pairs], alpha=strength)


def lora_factors(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    *,
    method: str = "proximal='delta_w'",
    otherwise: str = "Use proximal='l2', or other LoRA options.",
) -> list[Factors]:
    """Return the LoRA modules, as positions in `trainable`, if their A and B are all that is trainable.

    Args:
        method, otherwise: what needs them and what to do instead, for the error.

    Raises:
        ModelError: something else is trainable too, or a module does not add s B A to a linear layer (DoRA,
            embeddings, convolutions, fused experts, a bias).
    """
    names = list(trainable)
    found = []
    for position, name in enumerate(names):
        module_name, kind, adapter = _parts(name)
        module: Any = model.get_submodule(module_name) if kind else None
        plain = module is not None and adapter not in module.lora_variant and trainable[name].ndim == 2
        if not plain or type(module).__name__ == "ParamWrapper":
            raise ModelError(
                f"{method} needs the change B A of plain LoRA on linear layers, but {name} is trainable too "
                "and is not such a factor (DoRA, embeddings, biases, whole modules, fused experts and full "
                f"fine-tuning have none). {otherwise}"
            )
        if kind == "lora_B":
            other = names.index(f"{module_name}.lora_A.{adapter}.weight")
            found.append(Factors(position, other, float(module.scaling[adapter]), module_name))
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """Return module, kind and adapter of `...q_proj.lora_A.default.weight`; empty strings for other names."""
    for kind in ("lora_A", "lora_B"):
        module, middle, rest = name.rpartition(f".{kind}.")
        if middle and rest.endswith(".weight"):
            return module, kind, rest.removesuffix(".weight")
    return "", "", ""


def _placed_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return the same values, sharded like the weight; a plain tensor is returned as it is."""
    there: Any = weight
    return tensor.redistribute(placements=there.placements) if hasattr(tensor, "redistribute") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, in every process; a plain tensor is returned as it is."""
    there: Any = tensor
    return there.full_tensor() if hasattr(there, "full_tensor") else tensor


def sharded_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Shard a whole tensor, which is the same in every process, like the weight."""
    there: Any = weight
    if not hasattr(there, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(tensor, there.device_mesh, [Replicate()] * there.device_mesh.ndim)
    return everywhere.redistribute(placements=there.placements)
