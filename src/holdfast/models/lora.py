"""The LoRA that a stage trains, on top of a model's frozen adapters: a new one, or one to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, first_line
from holdfast.models.loading import put_on


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
    _above(stacked, frozen)
    # The model to load the adapter on. PEFT itself would write the folder of the local cache.
    stacked.peft_config["default"].base_model_name_or_path = base
    return stacked


def continue_lora(model: Any, adapter: Path) -> Any:
    """Put an adapter called "default" on top of the adapters of `model`, trainable.

    Raises:
        ModelError: it does not fit the model, or is a DoRA on top of another adapter.
    """
    frozen = list(getattr(model, "peft_config", ()))
    model = put_on(model, adapter, trainable=True)
    if frozen and model.peft_config["default"].use_dora:
        raise ModelError(
            f"{adapter} is a DoRA adapter on top of another one. DoRA would scale the base weights without "
            "the adapter below it. Write model.adapters: merge."
        )
    _above(model, frozen)
    return model


def _above(model: Any, frozen: Sequence[str]) -> None:
    """Use the adapter "default" together with the frozen ones below it."""
    if frozen:
        model.base_model.set_adapter([*frozen, "default"])
        model.active_adapter = "default"  # FSDP saves this adapter in its checkpoints
    for name in frozen:
        model.set_requires_grad(name, False)
