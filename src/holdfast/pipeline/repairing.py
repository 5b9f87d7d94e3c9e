"""The stage after fine-tuning: what a recipe asks for, what would stop it, and doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.defenses import Planned, Tuned
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.files import remove_tree
from holdfast.pipeline.context import Context
from holdfast.recipe import Recipe
from holdfast.weights.folders import model_path

ROWS = {"train_dataset": "user", "alignment_dataset": "alignment", "harmful_dataset": "harmful"}
"""The role of the rows that a method calls by these names."""


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
    face = registry.faces("defenses")[recipe.post_hoc.defense]
    known, controls = face.parameters, face.facts.get("controls", ())
    swept, found = recipe.post_hoc.swept(), []
    for given in recipe.post_hoc.combinations():
        parameters = {name: parameter.default for name, parameter in known.items()} | given
        seed = given.get("seed", recipe.seed) if "seed" in known else None
        if "seed" not in given:
            parameters.pop("seed", None)
        tail = f", {shown({name: given[name] for name in swept})}" if swept else f" + {label(recipe)}"
        for name in controls:  # never under the method's own name
            if given.get(name) is not None and name not in swept:
                tail += f", {shown({name: given[name]})}"
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
        ModelError: it is missing, or the same as the run's model, which is the aligned one.
    """
    from holdfast.weights.folders import find_model, fingerprint

    if recipe.post_hoc is None or recipe.post_hoc.base is None:
        return model
    folder = find_model(str(model_path(recipe.post_hoc.base)), None, download)
    if fingerprint(folder) == fingerprint(model):
        raise ModelError(
            f"post_hoc.base ({recipe.post_hoc.base}) and model.path ({recipe.model.path}) are the same. Give "
            "the model before alignment as base."
        )
    return folder


def check(context: Context) -> None:
    """Find before training what would stop the stage: values of its parameters, and what the method checks.

    Raises:
        RecipeError, ModelError: the method refuses a parameter, or the repair is not possible.
    """
    recipe = context.recipe
    if recipe.post_hoc is None:
        return
    method = registry.get_defense(recipe.post_hoc.defense)
    config: Any = method.config
    known = _planned(context)
    for repair in repairs(recipe):
        try:
            if config is not None:
                config(**repair.settings)
            if method.check is not None:
                method.check(known, **repair.settings)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"post_hoc.{recipe.post_hoc.defense}: {error}.") from None


def _planned(context: Context) -> Planned:
    """What is known before anything is trained."""
    from holdfast.models.trained import adapted_modules

    recipe = context.recipe
    assert recipe.post_hoc is not None
    aligned, trains = recipe.alignment is not None, recipe.trains("user")

    def modules(stage: str) -> set[str] | None:
        stage = "alignment" if stage == "user" and trains == "continue" else stage
        lora = recipe.lora(stage) if getattr(recipe, stage) is not None else None
        if lora is None or recipe.trains(stage) == "full":
            return None
        return adapted_modules(context.model, lora.identity(), recipe.model.trust_remote_code)

    return Planned(
        model=context.model,
        base=find_base(recipe, context.model) if aligned or recipe.post_hoc.base else None,
        trains=trains,
        aligns=recipe.trains("alignment") if aligned else None,
        find_modules=modules,
    )


def rows(recipe: Recipe, data: Mapping[str, str]) -> dict[str, str]:
    """The data steps that the method gets, by name ("train_dataset", ...); `data` has them by role."""
    wanted = {*recipe.needs("post_hoc"), *recipe.may_use("post_hoc")}
    return {name: data[role] for name, role in ROWS.items() if name in wanted and role in data}


def apply(
    folder: Path,
    context: Context,
    defense: str,
    settings: Mapping[str, Any],
    tuned: str,
    aligned: str | None,
    base: Path | None,
    rows: Mapping[str, str],
) -> dict[str, Any]:
    """A repaired copy of what the step `tuned` made, under the same name ("adapter" or "model").

    Args:
        aligned: the alignment step on `base`; None if the run's model is the aligned one.
        base: the model before alignment, if the run has it.
        rows: the data steps that the method gets, as `rows` returns them.
    """
    from holdfast.models.loading import load_tokenizer

    for rest in folder.iterdir():  # of a run that was stopped
        remove_tree(rest)
    recipe, source, method = context.recipe, context.made(tuned), registry.get_defense(defense)
    guide = context.made(aligned) if aligned else context.model
    wanted = {*method.needs, *method.optional}
    given = Tuned(
        source=source,
        out=folder / source.name,
        trains=recipe.trains("user"),
        base=base if "base" in wanted else None,
        aligned=guide if "aligned" in wanted else None,
        seed=recipe.seed,
        device=context.device,
        dtype=recipe.model.dtype,
        load_rows={name: partial(context.rows, step) for name, step in rows.items()},
        load_tokenizer=partial(load_tokenizer, context.model, recipe.model.trust_remote_code)
        if "tokenizer" in wanted
        else None,
    )
    assert method.apply is not None
    return {"repair": method.apply(given, **settings)}
