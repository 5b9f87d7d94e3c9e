"""Keep 4-bit weights differentiable."""

from __future__ import annotations

from typing import Any


def keep_differentiable(model: Any) -> None:
    """Prevent bitsandbytes (0.50) from converting 4-bit weights into a form without gradients.

    On a CPU with AVX512-BF16 it repacks each layer at the first forward in evaluation mode, for an operation
    that has no gradient. Later training then lacks the gradients that flow through these layers, and torch
    only warns. This was seen by forcing that path on another CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
