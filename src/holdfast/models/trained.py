"""Prepare and save the weights that a stage trains: a new LoRA, the last adapter below, or all weights.

A new LoRA is stacked on the adapters of the chain (double LoRA). Single LoRA continues with a copy of the
last adapter, which it replaces. Full fine-tuning first adds the adapters to the weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, RecipeError, nearest
from holdfast.models.dtypes import stored_dtype
from holdfast.models.loading import empty_model, load_model
from holdfast.models.lora import add_lora, continue_lora
from holdfast.models.quantization import is_quantized
from holdfast.weights.adapter import MUTATING
from holdfast.weights.patterns import check_patterns, matches_end


def load_trainable(
    folder: Path,
    adapters: Sequence[Path],
    trains: str,
    lora: Mapping[str, Any] | None,
    *,
    base: str,
    seed: int,
    initial: Path,
    **options: Any,
) -> Any:
    """Return the model with exactly the weights trainable that the stage trains.

    Args:
        adapters: the chain of earlier adapters.
        trains: "new", "continue" (the last of `adapters`) or "full".
        lora: the settings of a new adapter.
        base: the name of the base model, for the configuration of the adapter.
        initial: a folder for the initial adapter, which saving needs if it changed the base weights.
        options: options of `load_model`.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from transformers import set_seed

    below = adapters[:-1] if trains == "continue" else adapters
    if trains == "full":
        options["compose"] = "merge"
    model = load_model(folder, below, **options)
    set_seed(seed)
    if trains == "full":
        make_savable(model)
        return model.requires_grad_(True)
    if trains == "continue":
        return continue_lora(model, adapters[-1])
    assert lora is not None
    model = add_lora(model, lora, base)
    if lora.get("init_lora_weights") in MUTATING:
        model.save_pretrained(initial, selected_adapters=["default"])
    return model


def make_savable(model: Any) -> None:
    """Replace generation settings that transformers loads but refuses to save, as those of Llama-2.

    They set a temperature without sampling. Only the ids of special tokens are kept, for the checkpoints of
    the training; `save_trained` writes the settings of the base folder.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(settings, name, None) for name in ids})


def save_trained(
    model: Any,
    tokenizer: Any,
    folder: Path,
    initial: Path,
    weights: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> None:
    """Write an adapter folder that fits the original base model, or a whole model with its tokenizer.

    `weights` are the whole trained weights by name, if `model` holds only parts of them. A whole model gets
    the generation settings of the folder `base` unchanged.

    A LoRA that was subtracted from the base weights (PiSSA, OLoRA) becomes a plain LoRA of twice the rank:
    `B A - B0 A0`, where B0 and A0 are its initial values.
    """
    if not hasattr(model, "peft_config"):
        buffers = {} if weights is None else dict(model.named_buffers())
        kept = {name: buffers[name] for name in model.state_dict() if name in buffers}
        model.save_pretrained(folder, state_dict=None if weights is None else kept | dict(weights))
        tokenizer.save_pretrained(folder)
        settings = base / "generation_config.json" if base else None
        if settings and settings.is_file():
            shutil.copyfile(settings, folder / settings.name)
        return
    mutated = model.peft_config["default"].init_lora_weights in MUTATING
    model.save_pretrained(
        folder,
        selected_adapters=["default"],
        state_dict=weights,
        path_initial_model_for_weight_conversion=str(initial) if mutated else None,
    )


def check_trained(
    folder: Path, lora: Mapping[str, Any] | None, dtype: str, trust_remote_code: bool, model: Any = None
) -> None:
    """Check, before any weight is loaded, that the stage can train these weights.

    Args:
        lora: the settings of a new adapter; None for all weights.
        dtype: as in the recipe, "auto" or a name.
        model: the model in the folder without numbers, if it was built before.

    Raises:
        RecipeError, ModelError: a setting does not fit; the message says which.
    """
    if lora is not None:
        return check_lora(folder, lora, trust_remote_code, model)
    if is_quantized(folder):
        raise ModelError(f"lora: none trains all weights, but those in {folder} are quantised. Use LoRA.")
    kind = stored_dtype(folder) if dtype == "auto" else dtype
    if kind != "float32":
        raise RecipeError(
            f"lora: none trains all weights, and in {kind} small updates are rounded away. Write "
            "model.dtype: float32; with training: {bf16: true} the computation still runs in bfloat16."
        )


def check_lora(
    folder: Path, lora: Mapping[str, Any], trust_remote_code: bool = False, model: Any = None
) -> None:
    """Check that every LoRA target and pattern matches a module of the model.

    PEFT itself accepts a list if one of its targets is found, so it would not report a misspelt target.

    Raises:
        ModelError: the model cannot be built, or a name is not in it; the message lists its layers.
    """
    from transformers.pytorch_utils import Conv1D

    model = model or empty_model(folder, trust_remote_code)
    leaves = {name: module for name, module in model.named_modules() if name and not list(module.children())}
    check_patterns("lora", lora, list(leaves))
    targets = lora["target_modules"]
    if targets != "all-linear":
        _check_names(folder, leaves, "target_modules", targets)
    if lora.get("exclude_modules"):
        _check_names(folder, leaves, "exclude_modules", lora["exclude_modules"])
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key, {}):
            if not any(matches_end(pattern, name) for name in leaves):
                raise _unknown(folder, key, pattern, leaves)
    if lora.get("init_lora_weights") == "olora" and any(isinstance(m, Conv1D) for m in leaves.values()):
        raise ModelError(
            f"lora.init_lora_weights: PEFT's olora treats the Conv1D layers of {folder} as transposed. "
            "Use pissa."
        )


def blueprint(folder: Path, lora: Mapping[str, Any] | None, trust_remote_code: bool = False) -> Any:
    """Return the model with the weights that a stage trains, on "meta" (no data). No `lora`: all weights."""
    import torch

    model = empty_model(folder, trust_remote_code)
    if lora is None:
        return model.requires_grad_(True)
    with torch.device("meta"):  # an initialisation cannot read the weights here
        return add_lora(model, {**lora, "init_lora_weights": True}, str(folder))


def adapted_modules(folder: Path, lora: Mapping[str, Any], trust_remote_code: bool = False) -> set[str]:
    """Return the names of the linear modules that a LoRA adapts, without embeddings."""
    model = blueprint(folder, lora, trust_remote_code).base_model.model
    return {name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", ())}


def _check_names(folder: Path, leaves: Mapping[str, Any], key: str, wanted: Sequence[str] | str) -> None:
    for target in [wanted] if isinstance(wanted, str) else wanted:
        if isinstance(wanted, str):
            found = any(re.fullmatch(target, name) for name in leaves)
        else:
            found = any(name == target or name.endswith(f".{target}") for name in leaves)
        if not found:
            raise _unknown(folder, key, target, leaves)


def _unknown(folder: Path, key: str, name: str, leaves: Mapping[str, Any]) -> ModelError:
    last = {leaf.rsplit(".", 1)[-1] for leaf in leaves}
    return ModelError(f"lora.{key}: no layer of {folder} is called '{name}'.{nearest(name, last)}")
