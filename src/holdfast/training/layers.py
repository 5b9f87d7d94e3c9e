"""Find the decoder layers of any causal language model, and the attention of each layer, by structure.

There is no list of class names. Decoder layers are the modules that transformers itself checkpoints
(`GradientCheckpointingLayer`), in a list as long as the configuration says. The mixer of a layer (attention
or its replacement) is the only child that has submodules and a name that says so. Checked on 34
architectures, tested on thirteen.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from holdfast.errors import ModelError


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the decoder layers from lowest to highest. `model` may be wrapped by PEFT, DDP or FSDP2.

    Raises:
        ModelError: no layers are found, or their number differs from the configuration.
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
    """Return the attention module (or its replacement) of each decoder layer, from the lowest.

    Raises:
        ModelError: a layer has no such module, or several.
    """
    return [_mixer(layer) for layer in decoder_layers(model)]


def _mixer(layer: nn.Module) -> nn.Module:
    # Some norms have attention in their name (post_attention_layernorm), and PEFT can give a norm submodules.
    found = {
        name: child
        for name, child in layer.named_children()
        if re.search("attn|attention|mixer", name) and "norm" not in name and list(child.children())
    }
    if len(found) != 1:
        raise ModelError(
            f"Expected one attention module in each {type(layer).__name__}, found "
            f"{', '.join(found) or 'none'} among {', '.join(name for name, _ in layer.named_children())}. "
            "A method that works on attention outputs needs another model."
        )
    return next(iter(found.values()))


def plain_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside the wrappers of PEFT and DDP (FSDP2 does not wrap).

    Raises:
        ModelError: there is no such model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "get_decoder") or not hasattr(inner, "config"):
        raise ModelError(
            f"Expected a causal language model of transformers, found {type(inner).__name__}, which has no "
            "get_decoder()."
        )
    return inner


def text_config(model: nn.Module) -> Any:
    """The part of a model's configuration that describes its decoder."""
    return model.config.get_text_config()  # type: ignore[operator,union-attr]
