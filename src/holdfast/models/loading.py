"""Loading a tokenizer, a model with its adapters, or a classifier: every `from_pretrained` is in this file.

Only safetensors files are read, and a folder that lacks some of the model's weights is refused: transformers
and PEFT would fill them with random numbers and warn.

Adapters form a chain (alignment, then user). They are stacked as frozen adapters, or merged in memory as the
reference implementations do. A merged model is never saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, first_line
from holdfast.models.dates import fix_date
from holdfast.models.quantization import (
    check_quantization,
    is_quantized,
    quantization_config,
    stored_dtype,
)
from holdfast.weights.folders import check_adapter


def load_tokenizer(folder: Path, trust_remote_code: bool = False, date: str | None = None) -> Any:
    """Return the tokenizer with a pad token (its end-of-sequence token if it has no pad token).

    Args:
        date: what a chat template that writes today's date writes, as in "2026-03-01"; the default is fixed.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"Cannot load a tokenizer from {folder}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token, so answers cannot end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    fix_date(tokenizer, date)
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
        ModelError: the model or an adapter cannot be loaded, or lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_quantization(folder, quantization)
    quantized = quantization is not None or is_quantized(folder)
    place: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
    if quantization is not None:
        compute = getattr(torch, stored_dtype(folder) if dtype == "auto" else dtype)
        place["quantization_config"] = quantization_config(quantization, compute)
    model, missing = _from_folder(
        AutoModelForCausalLM,
        folder,
        "model",
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        **place,
    )
    if missing:
        raise ModelError(
            f"The weights in {folder} lack {_named(missing)}, which would be random. Expected all weights of "
            f"{type(model).__name__}; save the model again."
        )
    if quantized:
        from holdfast.training.quantised import keep_differentiable

        keep_differentiable(model)
    else:
        model = model.to(device)
    for i, adapter in enumerate(adapters):
        if compose == "merge":
            model = put_on(model, adapter).merge_and_unload(safe_merge=True)
        else:
            model = put_on(model, adapter, f"stage{i}")
            model.base_model.set_adapter(list(model.peft_config))
            _silence_dropout(model, f"stage{i}")
    model.requires_grad_(False)
    return model.eval()


def load_classifier(folder: Path, device: str = "cpu") -> Any:
    """A sequence classifier with one sigmoid output for each label.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has no pad token.
    """
    from transformers import AutoModelForSequenceClassification

    model, missing = _from_folder(
        AutoModelForSequenceClassification, folder, "judge", problem_type="multi_label_classification"
    )
    if missing:
        raise ModelError(
            f"{folder} holds no classifier: its weights lack {_named(missing)}, which would be random. "
            "Expected a sequence classifier in beaver-dam's format."
        )
    if model.config.pad_token_id is None:
        raise ModelError(
            f"The judge in {folder} has no pad_token_id in config.json; batches could not be read."
        )
    return model.eval().to(device)


def empty_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The causal language model on "meta": its modules without numbers.

    Raises:
        ModelError: it cannot be built from its config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged or foreign config can raise any exception
        raise ModelError(f"Cannot build the model in {folder}: {first_line(error)}") from None


def put_on(model: Any, adapter: Path, name: str = "default", trainable: bool = False) -> Any:
    """The model with the adapter in a folder, under `name`.

    Raises:
        ModelError: it is not an adapter in safetensors, does not fit the model, or lacks weights.
    """
    from peft import PeftModel

    check_adapter(adapter)
    try:
        with warnings.catch_warnings():
            # from_pretrained only warns about missing weights; load_adapter returns their names
            warnings.filterwarnings("error", "Found missing adapter keys")
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=trainable)
            missing = model.load_adapter(adapter, adapter_name=name, is_trainable=trainable).missing_keys
    except Exception as error:  # a damaged folder can raise any exception in PEFT
        raise ModelError(f"Cannot load the adapter in {adapter}: {first_line(error)}") from None
    if missing:
        raise ModelError(f"The adapter in {adapter} lacks {_named(missing)}. Save the adapter again.")
    return model


def _from_folder(kind: Any, folder: Path, what: str, **options: Any) -> tuple[Any, list[str]]:
    """A model from a folder's safetensors files, and the names of the weights that they lack."""
    try:
        model, told = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # a damaged folder can raise any exception in the loader
        raise ModelError(f"Cannot load the {what} in {folder}: {first_line(error)}") from None
    return model, sorted(told["missing_keys"])


def _named(missing: Sequence[str]) -> str:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return ", ".join(missing[:3]) + more


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
