"""The stage after fine-tuning: what a recipe asks for, what would stop it, and doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.files import remove_tree
from holdfast.pipeline.context import Context
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


def find_base(recipe: Recipe, model: Path, download: bool = False) -> Path:
    """The folder of the model before alignment: the one that the recipe names, else the run's.

    Raises:
        ModelError: it is missing, or the same as the run's model although that is aligned.
    """
    from holdfast.weights.folders import find_model, fingerprint

    if recipe.post_hoc is None or recipe.post_hoc.base is None:
        return model
    folder = find_model(str(model_path(recipe.post_hoc.base)), None, download)
    if fingerprint(folder) == fingerprint(model):
        raise ModelError(
            f"post_hoc.base ({recipe.post_hoc.base}) and model.path ({recipe.model.path}) are the same: "
            "there is no direction from base to aligned. Give the model before alignment as base."
        )
    return folder


def check(context: Context) -> None:
    """What would stop the stage, found before training: values of its parameters, weights that do not fit.

    Raises:
        RecipeError: the method refuses a parameter, or nothing that the user stage trains has a direction.
        ModelError: the weights of the base cannot be read, or are of another architecture.
    """
    recipe = context.recipe
    if recipe.post_hoc is None:
        return
    count = len(_repairable(context))
    config: Any = registry.get_defense(recipe.post_hoc.defense).config
    for repair in repairs(recipe) if config is not None else ():
        try:
            made = config(**repair.settings)
            if hasattr(made, "check_modules"):
                made.check_modules(count)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"post_hoc.{recipe.post_hoc.defense}: {error}.") from None


def _repairable(context: Context) -> set[str]:
    """The modules that the user stage trains and that the alignment gives a direction, by the model alone."""
    from holdfast.models.trained import adapted_modules
    from holdfast.weights.matching import check_pair, find_weight, linear_weights
    from holdfast.weights.reader import open_weights

    recipe = context.recipe
    with open_weights(find_base(recipe, context.model)) as base, open_weights(context.model) as model:
        found = linear_weights(model)
        for name, weight in found.items():
            check_pair(weight, find_weight(base, name))
    loras = [
        recipe.lora(stage)
        for stage in ("user", "alignment")
        if getattr(recipe, stage) is not None and recipe.trains(stage) == "new"
    ]
    adapted = [
        adapted_modules(context.model, lora.identity(), recipe.model.trust_remote_code)
        for lora in loras
        if lora
    ]
    modules = set.intersection(*adapted) if adapted else set(found)
    if not modules:
        raise RecipeError(
            "post_hoc: the alignment's LoRA adapts none of the modules of the user's, so that there is no "
            "direction to repair by. Give both common target_modules."
        )
    return modules


def apply(
    folder: Path,
    context: Context,
    defense: str,
    settings: Mapping[str, Any],
    tuned: str,
    aligned: str | None,
    base: Path,
) -> dict[str, Any]:
    """A repaired copy of what the step `tuned` made, under the same name ("adapter" or "model").

    Args:
        aligned: the alignment step on `base`; None where the run's model is the aligned one.
        base: the model before alignment.
    """
    for rest in folder.iterdir():  # of a run that was stopped
        remove_tree(rest)
    source = context.made(tuned)
    guide = context.made(aligned) if aligned else context.model
    method = registry.get_defense(defense).apply
    assert method is not None
    return {"repair": method(source, folder / source.name, base=base, aligned=guide, **settings)}
