"""Leave out the casts of LoRA's inputs to float32 that autocast undoes.

PEFT keeps LoRA's weights in float32 and casts the inputs of lower precision to float32. Under autocast the
matrix product that follows casts them back. For quantised layers PEFT leaves the cast out itself. No number
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _UnlessAutocast:
    """True outside autocast. PEFT asks it in each forward of a layer, also while the layer is recomputed."""

    def __init__(self, device: str):
        self.device = device

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled(self.device)


@contextmanager
def without_undone_casts(model: Any, device: str) -> Iterator[None]:
    """Let the LoRA layers of `model` cast their inputs only outside the autocast of `device` ("cuda", "cpu").

    Layers with dropout or another kind of LoRA (DoRA, ...) are left as they are: they compute with the inputs
    before the matrix product.
    """
    layers = plain_layers(model) if hasattr(model, "peft_config") else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = _UnlessAutocast(device)
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = value


def plain_layers(model: nn.Module) -> list[Any]:
    """Return the layers with LoRA on a linear layer, without dropout and without a variant."""
    from peft.tuners.lora import Linear

    return [
        module
        for module in model.modules()
        if type(module) is Linear
        and not module.lora_variant
        and all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    ]
