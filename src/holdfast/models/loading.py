"""Load a tokenizer, and a model with its adapters.

Adapters form a chain (alignment, then user). They are stacked as frozen adapters, or merged in memory as the
reference implementations do. A merged model is never saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.models.quantization import (
    check_quantization,
    is_quantized,
    keep_differentiable,
    quantization_config,
    stored_dtype,
)
from holdfast.weights.folders import first_line


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer with a pad token (its end-of-sequence token if it has no pad token)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"Cannot load a tokenizer from {folder}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token, so answers cannot end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path,
    adapters: Sequence[Path] = (),
    *,
    compose: str = "stack",
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the causal language model with a chain of adapters, all frozen.

    Args:
        compose: "stack" keeps each adapter as a frozen PEFT adapter (named stage0, stage1, ...) without
            dropout; "merge" adds it to the weights in memory.
        quantization: "nf4" or "int8", or None for unchanged weights.

    Raises:
        ModelError: the folder cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any
    check_quantization(folder, quantization)
    quantized = quantization is not None or is_quantized(folder)
    place: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
    if quantization is not None:
        compute = getattr(torch, stored_dtype(folder) if dtype == "auto" else dtype)
        place["quantization_config"] = quantization_config(quantization, compute)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **place,
        )
    except Exception as error:  # a damaged folder can make the loader raise anything
        raise ModelError(f"Cannot load the model in {folder}: {first_line(error)}") from None
    if quantized:
        keep_differentiable(model)
    else:
        model = model.to(device)
    for i, adapter in enumerate(adapters):
        model = _add_adapter(model, adapter, f"stage{i}", compose)
    model.requires_grad_(False)
    return model.eval()


def _add_adapter(model: Any, adapter: Path, name: str, compose: str) -> Any:
    from peft import PeftModel

    if compose == "merge":
        return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    model.base_model.set_adapter(list(model.peft_config))
    _silence_dropout(model, name)
    return model


def _silence_dropout(model: Any, name: str) -> None:
    """Turn off the dropout of a frozen adapter, which must stay off while the model trains."""
    import torch

    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, torch.nn.ModuleDict) and name in dropout:
            dropout[name] = torch.nn.Identity()


def add_lora(model: Any, settings: Mapping[str, Any], base: str) -> Any:
    """Add a fresh, trainable LoRA called "default" on top of the adapters of `model`.

    Args:
        settings: a recipe's `lora` block: `r`, `alpha`, `dropout`, and other fields of `LoraConfig`.

    Raises:
        ModelError: PEFT refuses it.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    config = LoraConfig(task_type="CAUSAL_LM", **{renamed.get(k, k): v for k, v in settings.items()})
    stacked: Any = model
    frozen = list(model.peft_config) if isinstance(model, PeftModel) else []
    try:
        if frozen:
            stacked.add_adapter("default", config)
        else:
            stacked = get_peft_model(model, config)
    except ValueError as error:  # for example a target that is not a layer
        raise ModelError(
            f"PEFT refuses this LoRA ({first_line(error)}). A pattern in target_modules must match layers, "
            "not the modules that contain them."
        ) from None
    if frozen:
        stacked.base_model.set_adapter([*frozen, "default"])
        stacked.active_adapter = "default"  # FSDP saves this adapter in its checkpoints
    # The model to load the adapter on. PEFT itself would write the folder of the local cache.
    stacked.peft_config["default"].base_model_name_or_path = base
    for name in frozen:
        stacked.set_requires_grad(name, False)
    return stacked
