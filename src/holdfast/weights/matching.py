"""Find the weight on disk that belongs to a module: by name, never by position."""

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
"""Modules whose weight transformers stores as (in, out), by model type. Elsewhere the shape decides."""

TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""Last name parts of token embeddings, which an output head may be tied to."""
EMBEDDINGS = (*TOKENS, "wpe", "embed_positions", "position_embeddings", "tokens_embed", "positions_embed")
"""Last name parts of embeddings: lookup tables, not linear maps."""
HEADS = ("lm_head", "embed_out", "output", "score", "classifier")
"""Last name parts of output heads, which PEFT's "all-linear" also leaves out."""


def model_config(weights: Weights) -> Mapping[str, Any]:
    """Return the settings of a model: its `config.json`, or `weights.config`.

    Raises:
        ModelError: the file is not a table of settings.
    """
    if weights.config is not None:
        return weights.config
    config = read_config(safe_path(weights.folder, "config.json"))
    if not isinstance(config, dict):
        raise ModelError(f"{weights.folder / 'config.json'} is not a table of settings. Fetch it again.")
    return config


def find_weight(weights: Weights, module: str) -> Tensor:
    """Find the weight of `module`: the weight with that name, or the only one that differs by a prefix.

    A checkpoint may lack the prefix of the module that holds the layers (`h.0...` for `transformer.h.0...`),
    and a tied output head is stored as the embedding.

    Raises:
        ModelError: no weight matches, or more than one does.
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
        "The adapter is for another architecture, or the weight has another name there (fused or renamed "
        "at loading), which is not supported."
    )


def is_transposed(module: LoraModule, weight: Tensor, model_type: object) -> bool:
    """Whether `weight` is stored as (in, out): decided by its shape, or by the model type if it is square.

    Raises:
        ModelError: the shape fits neither way, or the layout of a square weight is unknown.
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
            f"weights as (in, out), and the shape of '{module.name}' is square, so it cannot tell. Unset "
            "it in adapter_config.json if the layers are torch.nn.Linear."
        )
    return module.kind in CONV1D.get(str(model_type), ())


def check_pair(aligned: Tensor, base: Tensor) -> None:
    """Check that two weights can be subtracted.

    Raises:
        ModelError: their shapes differ, or they are quantised.
    """
    for tensor in (aligned, base):
        tensor.check_floats()
    if aligned.shape != base.shape:
        raise ModelError(
            f"The aligned '{aligned.name}' has shape {list(aligned.shape)}, the base one {list(base.shape)}: "
            "base and aligned must have the same architecture. Check --base and --aligned."
        )


def linear_weights(weights: Weights) -> dict[str, Tensor]:
    """Return the weights of linear modules by module name: every matrix but embeddings and output heads."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in weights.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and 0 not in tensor.shape
        and kind_of(name.removesuffix(".weight")) not in (*EMBEDDINGS, *HEADS)
    }
