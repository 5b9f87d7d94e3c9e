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
from holdfast.machine.digests import Digests
from holdfast.machine.files import remove_tree
from holdfast.pipeline.chain import made_in, tokenizer_of
from holdfast.pipeline.data import rows_of
from holdfast.pipeline.step import Content, Inputs, Machine
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


def find_base(recipe: Recipe, model: Path, digests: Digests, download: bool = False) -> Path:
    """The folder of the model before alignment: the one that the recipe names, else the run's.

    Raises:
        ModelError: it is missing, or the same as the run's model, which is the aligned one.
    """
    from holdfast.weights.folders import find_model, fingerprint

    if recipe.post_hoc is None or recipe.post_hoc.base is None:
        return model
    folder = find_model(str(model_path(recipe.post_hoc.base)), None, download)
    if fingerprint(folder, digests) == fingerprint(model, digests):
        raise ModelError(
            f"post_hoc.base ({recipe.post_hoc.base}) and model.path ({recipe.model.path}) are the same. Give "
            "the model before alignment as base."
        )
    return folder


def repair_inputs(recipe: Recipe, model: Path, digests: Digests, download: bool = False) -> dict[str, Any]:
    """The inputs of a repair beside its method, its settings and the steps that it reads.

    The LoRA of each stage is None if that stage does not run or trains all weights.
    """
    from holdfast.weights.folders import fingerprint

    assert recipe.post_hoc is not None
    aligned, trains = recipe.alignment is not None, recipe.trains("user")
    known = aligned or recipe.post_hoc.base is not None
    base = find_base(recipe, model, digests, download) if known else None

    def lora(stage: str) -> dict[str, Any] | None:
        stage = "alignment" if stage == "user" and trains == "continue" else stage
        found = recipe.lora(stage) if getattr(recipe, stage) is not None else None
        return None if found is None or recipe.trains(stage) == "full" else found.identity()

    return {
        "before_alignment": Content(base, fingerprint(base, digests)) if base else None,
        "trains": trains,
        "aligns": recipe.trains("alignment") if aligned else None,
        "loras": {stage: lora(stage) for stage in ("user", "alignment")},
        "seed": recipe.seed,
    }


def check(inputs: Inputs, machine: Machine) -> None:
    """Find what would stop a repair: values of its parameters, and what the method itself checks.

    Raises:
        RecipeError, ModelError: the method refuses a parameter, or the repair is not possible.
    """
    method, settings = inputs["method"], inputs["settings"]
    try:
        if method.config is not None:
            method.config(**settings)
        if method.check is not None:
            method.check(_planned(inputs), **settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"post_hoc.{method.name}: {error}.") from None


def _planned(inputs: Inputs) -> Planned:
    """What is known before anything is trained."""
    from holdfast.models.trained import adapted_modules

    described = inputs["model"]
    folder = described["base"].folder

    def modules(stage: str) -> set[str] | None:
        lora = inputs["loras"][stage]
        return None if lora is None else adapted_modules(folder, lora, described["trust_remote_code"])

    return Planned(
        model=folder,
        base=inputs["before_alignment"],
        trains=inputs["trains"],
        aligns=inputs["aligns"],
        find_modules=modules,
    )


def rows(recipe: Recipe, data: Mapping[str, str]) -> dict[str, str]:
    """The data steps that the method gets, by name ("train_dataset", ...); `data` has them by role."""
    wanted = {*recipe.needs("post_hoc"), *recipe.may_use("post_hoc")}
    return {name: data[role] for name, role in ROWS.items() if name in wanted and role in data}


def apply(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """A repaired copy of what the user stage trained, under the same name ("adapter" or "model")."""
    for rest in folder.iterdir():  # of a run that was stopped
        remove_tree(rest)
    method, described = inputs["method"], inputs["model"]
    source = made_in(inputs["tuned"])
    aligned = made_in(inputs["aligned"]) if inputs["aligned"] else described["base"].folder
    wanted = {*method.needs, *method.optional}
    given = Tuned(
        source=source,
        out=folder / source.name,
        trains=inputs["trains"],
        base=inputs["before_alignment"] if "base" in wanted else None,
        aligned=aligned if "aligned" in wanted else None,
        seed=inputs["seed"],
        device=machine.device,
        dtype=described["dtype"],
        load_rows={name: partial(rows_of, step) for name, step in inputs["rows"].items()},
        load_tokenizer=partial(tokenizer_of, described) if "tokenizer" in wanted else None,
    )
    return {"repair": method.apply(given, **inputs["settings"])}
