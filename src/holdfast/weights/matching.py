"""Which weight on disk belongs to a module: by name, never by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.errors import ModelError, nearest
from holdfast.weights.adapter import LoraModule, kind_of
from holdfast.weights.files import read_config, safe_path
from holdfast.weights.reader import Tensor, Weights

CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
}
"""Modules whose weight transformers stores as (in, out), by model type; the shape tells it elsewhere."""

TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""Last names of token embeddings, with which an output head may be tied."""
EMBEDDINGS = (*TOKENS, "wpe", "embed_positions", "position_embeddings", "tokens_embed", "positions_embed")
"""Last names of embeddings: tables that are looked up, not linear maps."""
HEADS = ("lm_head", "embed_out", "output", "score", "classifier")
"""Last names of output heads, which PEFT's "all-linear" leaves out too."""


def model_config(weights: Weights) -> Mapping[str, Any]:
    """The `config.json` of a model.

    Raises:
        ModelError: it is no table of settings.
    """
    config = read_config(safe_path(weights.folder, "config.json"))
    if not isinstance(config, dict):
        raise ModelError(f"{weights.folder / 'config.json'} is no table of settings. Fetch it again.")
    return config


def find_weight(weights: Weights, module: str) -> Tensor:
    """The weight of `module`: of that name, or the only one that differs by a prefix alone.

    A checkpoint may lack the prefix of the module that holds the layers (`h.0...` for `transformer.h.0...`),
    and a tied output head is stored as the embedding.

    Raises:
        ModelError: there is none, or more than one.
    """
    wanted = f"{module}.weight"
    if wanted in weights:
        return weights[wanted]
    found = [name for name in weights if f".{wanted}".endswith(f".{name}") or name.endswith(f".{wanted}")]
    if not found and kind_of(module) in HEADS and model_config(weights).get("tie_word_embeddings", True):
        found = [name for name in weights if kind_of(name.removesuffix(".weight")) in TOKENS]
    if len(found) == 1:
        return weights[found[0]]
    if found:
        raise ModelError(f"{weights.folder} has {len(found)} weights that could be '{module}': {found[:4]}.")
    close = nearest(wanted, weights)
    raise ModelError(
        f"{weights.folder} has no weight '{wanted}'.{close if 'Did you mean' in close else ''} "
        "The adapter is for another architecture, or the weight is stored under another name there (fused "
        "or renamed when loaded), which is not supported."
    )


def is_transposed(module: LoraModule, weight: Tensor, model_type: object) -> bool:
    """Whether `weight` is stored as (in, out): by its shape, for a square one by what the model is.

    Raises:
        ModelError: the shape fits neither way, or nothing tells which way a square one is stored.
    """
    out, into = module.shape
    straight, turned = weight.shape == (out, into), weight.shape == (into, out)
    if not straight and not turned:
        raise ModelError(
            f"'{module.name}' adapts a weight of shape [{out}, {into}], but '{weight.name}' in "
            f"{weight.file.path} has {list(weight.shape)}. The adapter is for another model."
        )
    if straight != turned:
        return turned
    if module.fan_in_fan_out and str(model_type) not in CONV1D:
        raise ModelError(
            f"fan_in_fan_out is set, but a model of type {str(model_type)[:80]!r} is not known to store "
            f"weights as (in, out), and the square shape of '{module.name}' does not tell. Unset it in "
            "adapter_config.json if its layers are torch.nn.Linear."
        )
    return module.kind in CONV1D.get(str(model_type), ())


def check_pair(aligned: Tensor, base: Tensor) -> None:
    """Make sure that two weights can be subtracted.

    Raises:
        ModelError: their shapes differ, or they are quantised.
    """
    for tensor in (aligned, base):
        tensor.check_floats()
    if aligned.shape != base.shape:
        raise ModelError(
            f"The aligned '{aligned.name}' has shape {list(aligned.shape)}, the base one {list(base.shape)}: "
            "base and aligned must be two models of one architecture. Check --base and --aligned."
        )


def linear_weights(weights: Weights) -> dict[str, Tensor]:
    """The weights of linear modules by module: every matrix but embeddings and output heads."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in weights.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and 0 not in tensor.shape
        and kind_of(name.removesuffix(".weight")) not in (*EMBEDDINGS, *HEADS)
    }
