"""Train LoRA on the layers of bitsandbytes (0.50) without two of their side effects."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def keep_differentiable(model: Any) -> None:
    """Prevent bitsandbytes from converting 4-bit weights into a form without gradients.

    On a CPU with AVX512-BF16 it repacks each layer at the first forward in evaluation mode, for an operation
    that has no gradient. Later training then lacks the gradients that flow through these layers, and torch
    only warns. This was seen by forcing that path on another CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def without_kept_inputs(model: Any) -> Iterator[None]:
    """Let the 8-bit layers of `model` forget their inputs after each forward.

    They keep them for the gradient of their weights, which they do not compute. Checkpointing cannot drop
    these tensors, because they are attributes of the node in the graph: 3 GB for Llama-2-7B at 2000 tokens,
    and more if many inputs are outliers. No number changes.
    """
    hooks = [layer.register_forward_hook(_forget) for layer in frozen_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def frozen_layers(model: Any) -> list[Any]:
    """Return the 8-bit layers of `model` whose weights have no gradient."""
    if "bitsandbytes" not in sys.modules:  # it takes seconds to import
        return []
    from bitsandbytes.nn import Linear8bitLt

    return [m for m in model.modules() if isinstance(m, Linear8bitLt) and not m.weight.requires_grad]


def _forget(layer: Any, inputs: Any, output: Any) -> None:
    """Drop what `MatMul8bitLt` (GPU) and `MatMul8bitFp` (CPU) keep for the gradient of the weights."""
    if hasattr(output.grad_fn, "tensors"):
        output.grad_fn.tensors = (None, None, None)
    elif hasattr(output.grad_fn, "A"):
        output.grad_fn.A = None
