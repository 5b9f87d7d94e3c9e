"""The decoder layers of any causal language model, and the attention of each, found by structure.

No list of class names: a decoder layer is what transformers itself checkpoints
(`GradientCheckpointingLayer`), as many of them in one list as the configuration says; its mixer (attention,
or what stands in its place) is the one child with parts of its own whose name says so. Shown on 34
architectures, tested on thirteen.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from holdfast.errors import ModelError


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers from the lowest to the highest; `model` may be wrapped by PEFT, DDP or FSDP2.

    Raises:
        ModelError: none are there, or not as many as the configuration says.
    """
    model = plain_model(model)
    expected = text_config(model).num_hidden_layers
    stacks = [
        list(module)
        for module in model.get_decoder().modules()  # type: ignore[operator]
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    for stack in stacks:
        if len(stack) == expected:
            return stack
    raise ModelError(
        f"The decoder layers of {type(model).__name__} were not found: its configuration says {expected}, "
        f"its lists of layers have {', '.join(str(len(stack)) for stack in stacks) or 'none'}. "
        "A method that works on layers needs another model."
    )


def mixers(model: nn.Module) -> list[Any]:
    """The attention module (or what stands in its place) of each decoder layer, from the lowest.

    Raises:
        ModelError: a layer has none, or several.
    """
    return [_mixer(layer) for layer in decoder_layers(model)]


def _mixer(layer: nn.Module) -> nn.Module:
    # Norms are called after the attention too (post_attention_layernorm); PEFT can give one parts of its own.
    found = {
        name: child
        for name, child in layer.named_children()
        if re.search("attn|attention|mixer", name) and "norm" not in name and list(child.children())
    }
    if len(found) != 1:
        raise ModelError(
            f"One attention module was expected in each {type(layer).__name__}, found "
            f"{', '.join(found) or 'none'} among {', '.join(name for name, _ in layer.named_children())}. "
            "A method that works on attention outputs needs another model."
        )
    return next(iter(found.values()))


def plain_model(model: nn.Module) -> nn.Module:
    """The model of transformers inside PEFT's and DDP's wrappers (FSDP2 does not wrap).

    Raises:
        ModelError: there is none.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "get_decoder") or not hasattr(inner, "config"):
        raise ModelError(
            f"A causal language model of transformers is needed, found {type(inner).__name__}, which has no "
            "get_decoder()."
        )
    return inner


def text_config(model: nn.Module) -> Any:
    """The part of a model's configuration that describes its decoder."""
    return model.config.get_text_config()  # type: ignore[operator,union-attr]
