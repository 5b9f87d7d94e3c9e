"""The model of a step: a base model, and the weights that earlier steps trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.machine.digests import Digests
from holdfast.pipeline.step import Content, Machine
from holdfast.recipe import Recipe
from holdfast.registry import Face


@dataclass(frozen=True)
class Base:
    """The folder of a base model.

    Attributes:
        name: its path or Hub id.
        title: its name in model cards and adapter configurations, without a path of this machine.
    """

    folder: Path
    name: str
    title: str


def digest_of(folder: Path, digests: Digests) -> Any:
    """Return the value that identifies a model by its content; by its name if it is not on this machine."""
    from holdfast.weights.folders import fingerprint

    return fingerprint(folder, digests) if folder.is_dir() else {"elsewhere": str(folder)}


def with_folders(values: Mapping[str, Any], face: Face, digests: Digests) -> dict[str, Any]:
    """Return a method's parameters, with the folders of weights among them identified by their content."""
    named = face.facts.get("folders", ())
    return {
        name: Content(value, digest_of(Path(value), digests)) if name in named and value else value
        for name, value in values.items()
    }


def model_input(recipe: Recipe, folder: Path, digests: Digests, device: str = "auto") -> dict[str, Any]:
    """Return the base model of a recipe as an input: its content and how it is loaded on a device."""
    from holdfast.models.dtypes import used_dtype
    from holdfast.weights.card import public_name
    from holdfast.weights.folders import model_path

    model = recipe.model
    base = Base(folder, str(model_path(model.path)), public_name(model.path))
    return {
        "base": Content(base, digest_of(folder, digests)),
        # The place is what the recipe says, so that loading can say what it uses instead.
        "dtype": Content(model.dtype, used_dtype(folder, model.dtype, device)),
        "compose": model.adapters,
        "quantization": model.quantization,
        "trust_remote_code": model.trust_remote_code,
        "template_date": model.template_date,
    }


def loading(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `load_model` from an opened model input."""
    return {key: model[key] for key in ("dtype", "compose", "quantization", "trust_remote_code")}


def made_in(step: Path) -> Path:
    """Return a step's weights: its `model` folder if it trained all weights, otherwise its `adapter`."""
    return step / ("model" if (step / "model").is_dir() else "adapter")


def weights(base: Path, chain: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Return the model folder and the adapters on it, in order, after the steps in `chain`.

    A step that trained all weights made a model instead of an adapter; that model replaces all before it.
    """
    folder, adapters = base, list[Path]()
    for made in map(made_in, chain):
        if made.name == "model":
            folder, adapters = made, []
        else:
            adapters.append(made)
    return folder, adapters


def tokenizer_of(model: Mapping[str, Any]) -> Any:
    """Load the tokenizer of an opened model input."""
    from holdfast.models.loading import load_tokenizer

    return load_tokenizer(model["base"].folder, model["trust_remote_code"], date=model["template_date"])


def checked_tokenizer(model: Mapping[str, Any], machine: Machine) -> Any:
    """Return the tokenizer of an opened model input for checks, loaded once."""
    key = "tokenizer", model["base"].folder, model["trust_remote_code"], model["template_date"]
    return machine.once(key, lambda: tokenizer_of(model))


def checked_model(model: Mapping[str, Any], machine: Machine) -> Any:
    """Return the model without numbers, for checks that do not change it; it is built once.

    Raises:
        ModelError: it cannot be built.
    """
    from holdfast.models.loading import empty_model

    folder, trusted = model["base"].folder, model["trust_remote_code"]
    return machine.once(("model", folder, trusted), lambda: empty_model(folder, trusted))
