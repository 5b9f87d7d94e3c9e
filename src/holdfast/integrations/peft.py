"""PEFT: Safe LoRA on an adapter of a `PeftModel` in memory, in the shape of PEFT's own post-processing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.defenses.safe_lora import checked, versions
from holdfast.defenses.safe_lora_parts.result import SafeLoraResult
from holdfast.defenses.safe_lora_parts.updates import Sources, fingerprint_files, is_adapter, lora_updates
from holdfast.defenses.safe_lora_parts.work import Work
from holdfast.errors import ModelError, RecipeError, nearest
from holdfast.integrations.held import held_adapter, held_weights
from holdfast.weights.adapter import Adapter, natural, read_adapter
from holdfast.weights.reader import Tensor, Weights, open_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def apply_safe_lora(
    peft_model: PeftModel,
    base: str | Path | nn.Module,
    aligned: str | Path | nn.Module,
    *,
    adapter_name: str = "default",
    new_adapter_name: str = "safe_lora",
    threshold: float | str | None = None,
    num_layers: int | None = None,
    projection: str = "approx",
    control: str | None = None,
    seed: int = 42,
    device: str = "cpu",
    dtype: str = "float32",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SafeLoraResult:
    """Add a copy of an adapter in which the dissimilar updates are projected, and make it the active one.

    The numbers are those of `safe_lora` on the saved adapter. The old adapter does not change:
    `peft_model.set_adapter(adapter_name)` activates it again.

    Args:
        peft_model: the model with the LoRA adapter. Its own base weights are not read and may be quantised.
        base: the model before alignment, unquantised: a module in memory, a folder or a Hub id.
        aligned: the model that was fine-tuned, in the same forms (`peft_model.get_base_model()` if it is not
            quantised), or the folder of an alignment adapter on `base`.
        adapter_name: the adapter to repair.
        new_adapter_name: the name of the repaired copy.
        threshold: project the modules with a smaller cosine; "suggest" uses the largest gap.
        num_layers: project this many of the least similar modules. Give this or `threshold`.
        projection: "approx", "exact" or "normalised".
        control: None, "drop" or "random".
        seed: the seed of the control "random".
        device: "cpu", or a torch device ("cuda") for the products with V.
        dtype: dtype of the products, "float32" or "float64".
        workers: threads over modules.
        progress: called with the number of modules done and the number of all modules.

    Returns:
        The result for every module; `out` is None.

    Raises:
        RecipeError: an option is not valid, there is no such adapter, or the new name is taken.
        ModelError: a model or the adapter cannot be used. `peft_model` is then as before.
    """
    config = checked(threshold, num_layers, projection, control, seed, dtype)
    _check_names(peft_model, adapter_name, new_adapter_name)
    rewritten: dict[str, NDArray[np.uint8]] = {}

    def write(tensor: Tensor, values: NDArray[np.uint8]) -> None:
        rewritten[tensor.name] = values

    with ExitStack() as stack:
        bases = _open(base, "base", stack)
        opened: Adapter | Weights
        if isinstance(aligned, str | Path) and is_adapter(aligned):
            opened = stack.enter_context(read_adapter(aligned))
        else:
            opened = _open(aligned, "aligned", stack)
        lora = held_adapter(peft_model, adapter_name)
        updates = sorted(lora_updates(lora, bases, opened), key=lambda update: natural(update.name))
        sources = Sources(Path(), False, updates, [], {}, {}, lora.left_alone, list(lora.notes))
        work = Work(sources, config, write, device, dtype, workers, progress or (lambda done, total: None))
        modules, chosen, notes = work.run()
        facts = {
            "adapter": {"path": adapter_name, "fingerprint": "in memory"},
            "base": _source(base, bases),
            "aligned": _source(aligned, opened),
        }
    _add(peft_model, adapter_name, new_adapter_name, rewritten)
    options = {
        "kind": "adapter", "threshold": threshold, "num_layers": num_layers, "projection": projection,
        "control": control, "seed": seed, "device": device, "dtype": dtype,
    }  # fmt: skip
    return SafeLoraResult(None, modules, options | chosen, facts, notes, sources.left_alone, versions())


def _check_names(peft_model: Any, adapter_name: str, new_adapter_name: str) -> None:
    """Check that the model has the one adapter and not yet the other."""
    adapters = getattr(peft_model, "peft_config", None)
    if not isinstance(adapters, dict) or not hasattr(peft_model, "add_adapter"):
        raise RecipeError(f"Expected a PeftModel with a LoRA adapter, found {type(peft_model).__name__}.")
    if adapter_name not in adapters:
        raise RecipeError(f"The model has no adapter '{adapter_name}'.{nearest(adapter_name, adapters)}")
    if new_adapter_name in adapters:
        raise RecipeError(
            f"The model already has an adapter '{new_adapter_name}'. Give another new_adapter_name, or call "
            f"delete_adapter('{new_adapter_name}') first."
        )
    if any(getattr(part, "merged", False) is True for part in peft_model.modules()):
        raise RecipeError("An adapter is merged into the model. Call unmerge_adapter() first.")


def _open(model: str | Path | nn.Module, role: str, stack: ExitStack) -> Weights:
    if isinstance(model, str | Path):
        return stack.enter_context(open_weights(model))
    if not hasattr(model, "state_dict"):
        raise ModelError(f"{role}: expected a module, a folder or a Hub id, found {type(model).__name__}.")
    return held_weights(model, role)


def _source(given: Any, opened: Adapter | Weights) -> dict[str, str]:
    """Return what the result records of a source."""
    if not isinstance(given, str | Path):
        return {"path": type(given).__name__, "fingerprint": "in memory"}
    files = [opened.file] if isinstance(opened, Adapter) else opened.files
    return {"path": str(given), "fingerprint": fingerprint_files(files)}


def _add(peft_model: Any, old: str, new: str, rewritten: dict[str, NDArray[np.uint8]]) -> None:
    """Add a copy of the adapter `old` with the rewritten B, and make it active."""
    import torch

    source = peft_model.peft_config[old]
    config = deepcopy(source)
    config.init_lora_weights = True  # the values are copied below, so that no other initialisation is needed
    peft_model.add_adapter(new, config)
    config.init_lora_weights = source.init_lora_weights
    parameters = dict(peft_model.named_parameters())
    for name, parameter in parameters.items():
        head, found, tail = f"{name}.".rpartition(f".{new}.")
        if not found:
            continue
        model_side = parameters[f"{head}.{old}.{tail}".removesuffix(".")]
        values = model_side.detach().clone()
        saved = rewritten.get(f"{head}.{tail}".removesuffix("."))
        if saved is not None:
            values = torch.from_numpy(saved).view(values.dtype).reshape(values.shape).to(values.device)
        parameter.data = values
    peft_model.set_adapter(new)
