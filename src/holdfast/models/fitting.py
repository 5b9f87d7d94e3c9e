"""Compare the weights of a folder with the model: names, shapes, and whether all numbers are finite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, first_line
from holdfast.weights.adapter_folder import PREFIX, AdapterFolder
from holdfast.weights.files import read_config


def of_text(folder: Path, told: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Leave out unexpected tensors that the checkpoint of this model has for other purposes.

    A multimodal model also has towers for images or sound; some have layers that predict further tokens.
    """
    whole, text = read_config(folder / "config.json"), model.config.get_text_config().to_dict()
    towers = any(f"{part}_config" in whole for part in ("text", "vision", "audio"))
    own = {".".join(name.split(".")[:2]) for name in model.state_dict()}
    first = text.get("num_hidden_layers") or 0
    further = range(first, first + (text.get("num_nextn_predict_layers") or 0))

    def other(name: str) -> bool:
        layer = re.search(r"(?:^|\.)layers\.(\d{1,6})\.", name)
        if layer and int(layer[1]) in further:
            return True
        return towers and ".".join(name.split(".")[:2]) not in own

    return {**told, "unexpected_keys": [name for name in told["unexpected_keys"] if not other(name)]}


def check_names(folder: Path, kind: str, told: Mapping[str, Any]) -> None:
    """Refuse a model folder with tensors that are missing, of other shapes, or not part of the model.

    Raises:
        ModelError: the message names the tensors.
    """
    if told["missing_keys"]:
        raise ModelError(
            f"The weights in {folder} lack {named(told['missing_keys'])}, which would be random. Expected "
            f"all weights of {kind}; save the model again."
        )
    shapes = sorted((name, list(found), list(needed)) for name, found, needed in told["mismatched_keys"])
    if shapes:
        name, found, needed = shapes[0]
        more = f" ({len(shapes) - 1} more do not fit either)" if len(shapes) > 1 else ""
        raise ModelError(
            f"'{name}' has the shape {found} in the weights of {folder}, but config.json asks for {needed}"
            f"{more}. Weights and config.json belong to two models; save the model again."
        )
    if told["unexpected_keys"]:
        raise ModelError(
            f"The weights in {folder} have {named(told['unexpected_keys'])}, which {kind} would not use. "
            "config.json describes another model; save the model again."
        )


def check_finite(folder: Path, model: Any) -> None:
    """Refuse a model with NaN or infinity in its weights, whose answers would be arbitrary.

    Raises:
        ModelError: the message names the first of these tensors.
    """
    import torch

    for name, p in model.named_parameters():
        # One-byte floats belong to quantised weights; parameters of ZeRO-3 are empty here.
        if not p.is_floating_point() or p.element_size() == 1 or not p.numel():
            continue
        least, most = torch.aminmax(p.detach())  # NaN if there is one; quicker than isfinite
        if not (least.isfinite() and most.isfinite()):
            raise ModelError(
                f"'{name}' in {folder} holds values that are not finite (NaN or infinity). Save or fetch the "
                "weights again."
            )


def named(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def reason(error: Exception) -> str:
    """The first line of an error that says something: torch lists shapes from the second line on."""
    lines = str(error).split("\n")
    return next((line.strip()[:300] for line in lines if "size mismatch" in line), first_line(error))


def fit_embeddings(model: Any, adapter: AdapterFolder) -> None:
    """Resize the embeddings of a model to those in an adapter that was trained with added tokens.

    Nothing changes unless the adapter holds both tables, or the one table that both ends of the model share:
    the new rows would be random.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    places = {id(module): name for name, module in model.named_modules()}

    def held(module: Any) -> int | None:
        """The rows of the adapter's copy of a table."""
        key = f"{PREFIX}{places.get(id(module))}"
        found = (adapter.file.tensors.get(f"{key}{part}.weight") for part in ("", ".base_layer"))
        return next((tensor.shape[0] for tensor in found if tensor is not None and tensor.shape), None)

    rows = held(table)
    if rows is None or rows == table.weight.shape[0]:
        return
    # A trained copy of the embedding alone (modules_to_save) leaves a tied head as it is.
    shared = getattr(head, "weight", None) is table.weight and not adapter.config.get("modules_to_save")
    if shared or head is None or held(head) == rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
