"""How a model checkpoints its activations, and the hooks that checkpointing does not need."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from holdfast.training.private import is_reentrant, remove_input_hooks


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether a layer of `model` uses torch's reentrant checkpointing, which needs inputs with gradients.

    Reentrant checkpointing also does not work with `torch.autograd.grad`, so methods with two passes refuse
    it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return any(layer.gradient_checkpointing and is_reentrant(layer) for layer in layers)


def free_inputs(model: nn.Module) -> int:
    """Remove every hook that makes the embeddings' output require gradients; return the number of hooks.

    transformers and PEFT add a hook each time checkpointing is enabled, and remove only the last.
    Non-reentrant checkpointing needs none of them, and they extend backward, with its recomputation, through
    all layers below the lowest trainable layer. No gradient of a weight changes.
    """
    return sum(remove_input_hooks(module) for module in model.modules())
