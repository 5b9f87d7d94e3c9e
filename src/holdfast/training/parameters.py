"""The parameters that a training changes, and the size of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.private import foreach_norm


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that an optimizer step may change, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient_scale(accelerator: Any) -> float:
    """Return the factor for a gradient that is added by hand: in fp16, gradients are still scaled."""
    scaler = getattr(accelerator, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of all tensors, at least in float32 (a scalar, replicated if sharded)."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    total = torch.stack(foreach_norm(tensors, 2, dtype=wide)).square().sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total
