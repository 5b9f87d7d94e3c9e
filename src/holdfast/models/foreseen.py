"""Find what would stop the loading of a model by its config and the headers of its weight files.

The model is built without numbers, so that the check of a large model takes about a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.models.fitting import check_names, named
from holdfast.models.loading import empty_classifier, empty_model
from holdfast.models.quantization import is_quantized
from holdfast.weights.reader import open_weights


def check_causal(folder: Path) -> None:
    """Check that a folder holds a causal language model with its head.

    Raises:
        ModelError: its config describes no such model, or its weights lack the head.
    """
    model = empty_model(folder)
    told = {"missing_keys": _missing_head(folder, model), "mismatched_keys": (), "unexpected_keys": ()}
    check_names(folder, type(model).__name__, told)


def check_classifier(folder: Path) -> Any:
    """Check that a folder holds a sequence classifier with sigmoid outputs; returns its config.

    Raises:
        ModelError: its config describes no such model, or its weights lack the head.
    """
    model = empty_classifier(folder)
    config = model.config
    missing = _missing_head(folder, model)
    if missing:
        raise ModelError(
            f"{folder} holds no classifier: its weights lack {named(missing)}, which would be random. "
            "Expected a sequence classifier in beaver-dam's format."
        )
    if config.problem_type in ("single_label_classification", "regression"):
        raise ModelError(
            f"The classifier in {folder} is for {config.problem_type} (problem_type in config.json). "
            "Expected a sigmoid output for each category, as in beaver-dam: multi_label_classification."
        )
    if config.pad_token_id is None:
        raise ModelError(
            f"The judge in {folder} has no pad_token_id in config.json; batches could not be read."
        )
    return config


def _missing_head(folder: Path, model: Any) -> list[str]:
    """Return the tensors of a model outside its body that are in none of a folder's weight files.

    Tensors in the body are not compared, because transformers renames some of them while it loads.
    """
    body = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    table = model.get_output_embeddings() if tied else None
    shared = {name for name, p in model.named_parameters() if table is not None and p is table.weight}
    if model.base_model is model or is_quantized(folder):
        return []
    with open_weights(folder) as weights:
        stored = list(weights)
    return [
        name
        for name in names
        if name not in shared and not any(f".{one}".endswith(f".{name}") for one in stored)
    ]
