"""Weights and adapters of torch modules in memory, in the form in which `weights/` reads files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.errors import ModelError
from holdfast.weights.adapter import Adapter, adapter_of
from holdfast.weights.adapter_folder import check_settings, check_tensors
from holdfast.weights.reader import Tensor, WeightFile, Weights

if TYPE_CHECKING:
    import torch
    from torch import nn

WRAPPED = (".base_layer", ".original_module")
"""Parts that PEFT adds to the names of the weights that it wraps."""
ADDED = (".lora_", ".modules_to_save.")
"""Parts in the names of PEFT's own weights."""


class HeldFile(WeightFile):
    """A `WeightFile` whose bytes are those of tensors in memory, on any device.

    Args:
        name: the name of the weights in messages.

    Raises:
        ModelError: a tensor has no values (it is on the device "meta").
    """

    def __init__(self, name: str, tensors: Mapping[str, torch.Tensor]):
        self.path = Path(name)
        self.held = dict(tensors)
        self.tensors, self.size = {}, 0
        self._places: dict[int, str] = {}
        for key, tensor in self.held.items():
            if tensor.is_meta:
                raise ModelError(
                    f"'{key}' of {name} has no values here: it is offloaded or not loaded yet. Give the "
                    "folder of the model instead."
                )
            size = tensor.numel() * tensor.element_size()
            self._places[self.size] = key
            self.tensors[key] = Tensor(key, _kind(tensor), tuple(tensor.shape), self, self.size, size)
            self.size += size

    def close(self) -> None:
        """Do nothing: the tensors belong to the caller."""

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from position `start`, which lie in one tensor."""
        import torch

        place = max(offset for offset in self._places if offset <= start)
        flat = self.held[self._places[place]].detach().reshape(-1).view(torch.uint8)
        part = flat[start - place : start - place + len(buffer)]
        np.frombuffer(buffer, np.uint8)[:] = part.cpu().numpy()


def held_weights(module: nn.Module, role: str) -> Weights:
    """Return the weights of a model in memory. LoRA on it is left out.

    Args:
        role: its name in messages, such as "base".

    Raises:
        ModelError: it is a `PeftModel`, or an adapter is merged into its weights.
    """
    if hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
        raise ModelError(
            f"{role} is a PeftModel. Give {role}=model.get_base_model() for the weights below the adapter, "
            "or a copy of the model with the adapter merged (merge_and_unload)."
        )
    if any(getattr(part, "merged", False) is True for part in module.modules()):
        raise ModelError(f"An adapter is merged into {role}. Call unmerge_adapter() first.")
    tensors = {}
    for name, tensor in module.state_dict().items():
        if not any(part in name for part in ADDED):
            for part in WRAPPED:
                name = name.replace(part, "")
            tensors[name] = tensor
    config = getattr(module, "config", None)
    file = HeldFile(f"the {role} module", tensors)
    return Weights(file.path, [file], file.tensors, config.to_dict() if config is not None else {})


def held_adapter(peft_model: Any, adapter_name: str) -> Adapter:
    """Return the records of an adapter of a `PeftModel`, under the names that PEFT saves.

    Raises:
        ModelError: the adapter is not a plain LoRA, or its values are not finite.
    """
    from peft import get_peft_model_state_dict

    settings = peft_model.peft_config[adapter_name].to_dict()
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    config["peft_type"] = getattr(config["peft_type"], "value", config["peft_type"])
    config["task_type"] = getattr(config["task_type"], "value", config["task_type"])
    folder = Path(f"the adapter '{adapter_name}'")
    check_settings(folder, config)
    tensors = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    file = HeldFile(folder.name, tensors)
    check_tensors(file)
    return adapter_of(folder, config, file)


def _kind(tensor: torch.Tensor) -> str:
    """Return the dtype of a tensor in the spelling of safetensors; quantised weights are not floats there."""
    name = str(tensor.dtype).removeprefix("torch.")
    floats = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
    return floats.get(name, name)
