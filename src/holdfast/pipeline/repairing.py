"""The stage after fine-tuning: what a recipe asks for, what would stop it, and doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.digests import Digests
from holdfast.machine.files import remove_tree
from holdfast.pipeline.chain import made_in
from holdfast.pipeline.step import Content, Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.weights.folders import model_path


@dataclass(frozen=True)
class Repair:
    """One combination of parameters, which makes a state of the model.

    Attributes:
        name: of the state.
        given: the parameters as the recipe gives them.
        parameters: the same with defaults; without the seed where it is the run's, so that rows over seeds
            differ in nothing else.
        seed: what decides chance; None where the method has no such parameter.
    """

    name: str
    given: Mapping[str, Any]
    parameters: Mapping[str, Any]
    seed: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the method is called with."""
        return {**self.parameters, **({} if self.seed is None else {"seed": self.seed})}


def label(recipe: Recipe) -> str:
    """The method as its paper writes it."""
    assert recipe.post_hoc is not None
    return registry.faces("defenses")[recipe.post_hoc.defense].facts.get("label", recipe.post_hoc.defense)


def repairs(recipe: Recipe) -> list[Repair]:
    """The repairs that a recipe asks for, one for each combination of its lists; empty without a stage."""
    if recipe.post_hoc is None:
        return []
    known = registry.faces("defenses")[recipe.post_hoc.defense].parameters
    swept, found = recipe.post_hoc.swept(), []
    for given in recipe.post_hoc.combinations():
        parameters = {name: parameter.default for name, parameter in known.items()} | given
        seed = given.get("seed", recipe.seed) if "seed" in known else None
        if "seed" not in given:
            parameters.pop("seed", None)
        tail = f", {shown({name: given[name] for name in swept})}" if swept else f" + {label(recipe)}"
        if given.get("control") is not None and "control" not in swept:  # never under the method's own name
            tail += f", control={given['control']}"
        found.append(Repair(f"{recipe.name}{tail}", given, parameters, seed))
    return found


def shown(parameters: Mapping[str, Any]) -> str:
    """Parameters as a name holds them: "threshold=0.35, control=none"."""

    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)

    return ", ".join(f"{name}={text(value)}" for name, value in parameters.items())


def find_base(recipe: Recipe, model: Path, digests: Digests, download: bool = False) -> Path:
    """The folder of the model before alignment: the one that the recipe names, else the run's.

    Raises:
        ModelError: it is missing, or the same as the run's model although that is aligned.
    """
    from holdfast.weights.folders import find_model, fingerprint

    if recipe.post_hoc is None or recipe.post_hoc.base is None:
        return model
    folder = find_model(str(model_path(recipe.post_hoc.base)), None, download)
    if fingerprint(folder, digests) == fingerprint(model, digests):
        raise ModelError(
            f"post_hoc.base ({recipe.post_hoc.base}) and model.path ({recipe.model.path}) are the same: "
            "there is no direction from base to aligned. Give the model before alignment as base."
        )
    return folder


def repair_inputs(recipe: Recipe, model: Path, digests: Digests, download: bool = False) -> dict[str, Any]:
    """The inputs of a repair beside its method and the steps that it reads."""
    from holdfast.weights.folders import fingerprint

    base = find_base(recipe, model, digests, download)
    loras = [
        recipe.lora(stage)
        for stage in ("user", "alignment")
        if getattr(recipe, stage) is not None and recipe.trains(stage) == "new"
    ]
    return {
        "before_alignment": Content(base, fingerprint(base, digests)),
        "loras": [lora.identity() for lora in loras if lora],
    }


def check(inputs: Inputs, machine: Machine) -> None:
    """Find what would stop a repair: values of its parameters, weights that do not fit.

    Raises:
        RecipeError: the method refuses a parameter, or nothing that the user stage trains has a direction.
        ModelError: the weights of the base cannot be read, or are of another architecture.
    """
    count, method = len(_repairable(inputs)), inputs["method"]
    if method.config is None:
        return
    try:
        made = method.config(**inputs["settings"])
        if hasattr(made, "check_modules"):
            made.check_modules(count)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"post_hoc.{method.name}: {error}.") from None


def _repairable(inputs: Inputs) -> set[str]:
    """The modules that the user stage trains and that the alignment gives a direction, by the model alone."""
    from holdfast.models.trained import adapted_modules
    from holdfast.weights.matching import check_pair, find_weight, linear_weights
    from holdfast.weights.reader import open_weights

    described, before = inputs["model"], inputs["before_alignment"]
    folder, trusted = described["base"].folder, described["trust_remote_code"]
    with open_weights(before) as base, open_weights(folder) as model:
        found = linear_weights(model)
        for name, weight in found.items():
            check_pair(weight, find_weight(base, name))
    adapted = [adapted_modules(folder, lora, trusted) for lora in inputs["loras"]]
    modules = set.intersection(*adapted) if adapted else set(found)
    if not modules:
        raise RecipeError(
            "post_hoc: the alignment's LoRA adapts none of the modules of the user's, so that there is no "
            "direction to repair by. Give both common target_modules."
        )
    return modules


def apply(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """A repaired copy of what the user stage trained, under the same name ("adapter" or "model")."""
    for rest in folder.iterdir():  # of a run that was stopped
        remove_tree(rest)
    source = made_in(inputs["tuned"])
    aligned = made_in(inputs["aligned"]) if inputs["aligned"] else inputs["model"]["base"].folder
    method = inputs["method"].apply
    base = inputs["before_alignment"]
    return {"repair": method(source, folder / source.name, base=base, aligned=aligned, **inputs["settings"])}
