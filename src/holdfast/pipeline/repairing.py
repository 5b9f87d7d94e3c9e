"""The post-hoc stage: the repairs that a recipe asks for, their checks, and their execution."""

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
from holdfast.pipeline.chain import digest_of, made_in, tokenizer_of
from holdfast.pipeline.data import rows_of
from holdfast.pipeline.step import Content, Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.recipe.stages import StageRecipe
from holdfast.weights.folders import model_path

ROWS = {"train_dataset": "user", "alignment_dataset": "alignment", "harmful_dataset": "harmful"}
"""The role of the rows, by the name that a method uses."""


@dataclass(frozen=True)
class Repair:
    """One combination of parameters, which produces one state of the model.

    Attributes:
        name: the name of the state.
        given: the parameters as in the recipe.
        parameters: the same with defaults; without the seed if it is the run's, so that rows of different
            seeds differ in nothing else.
        seed: the random seed; None if the method has no such parameter.
    """

    name: str
    given: Mapping[str, Any]
    parameters: Mapping[str, Any]
    seed: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """All arguments of the method."""
        return {**self.parameters, **({} if self.seed is None else {"seed": self.seed})}


def label(recipe: Recipe) -> str:
    """Return the name of the method as its paper writes it."""
    assert recipe.post_hoc is not None
    return registry.face("defenses", recipe.post_hoc.defense).facts.get("label", recipe.post_hoc.defense)


def repairs(recipe: Recipe) -> list[Repair]:
    """Return the repairs of a recipe, one for each combination of its lists; none without post-hoc stage."""
    if recipe.post_hoc is None:
        return []
    face = registry.face("defenses", recipe.post_hoc.defense)
    known, controls = face.parameters, face.facts.get("controls", ())
    swept, found = recipe.post_hoc.swept(), []
    for given in recipe.post_hoc.combinations():
        parameters = {name: parameter.default for name, parameter in known.items()} | given
        seed = given.get("seed", recipe.seed) if "seed" in known else None
        if "seed" not in given:
            parameters.pop("seed", None)
        tail = f", {shown({name: given[name] for name in swept})}" if swept else f" + {label(recipe)}"
        for name in controls:  # a control never has the method's plain name
            if given.get(name) is not None and name not in swept:
                tail += f", {shown({name: given[name]})}"
        found.append(Repair(f"{recipe.name}{tail}", given, parameters, seed))
    return found


def shown(parameters: Mapping[str, Any]) -> str:
    """Return parameters as text for a name: "threshold=0.35, control=none"."""

    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)

    return ", ".join(f"{name}={text(value)}" for name, value in parameters.items())


def shown_after(parameters: Mapping[str, Any]) -> str:
    """Return parameters as text after another one; "" if there are none."""
    return f"; {shown(parameters)}" if parameters else ""


def hardens(part: StageRecipe) -> bool:
    """Whether a method of the alignment stage does not train, but changes what plain SFT aligned."""
    code = registry.face("defenses", part.defense).code
    return "apply" in code and "trainer" not in code


def hardening_inputs(recipe: Recipe, model: Path, digests: Digests) -> dict[str, Any]:
    """Return the inputs of a change of the aligned weights, as `repair_inputs` does; it has no `loras`."""
    trains = recipe.trains("alignment")
    return {
        "before_alignment": Content(model, digest_of(model, digests)),
        "trains": trains,
        "aligns": trains,
        "seed": recipe.seed,
    }


def find_base(recipe: Recipe, stage: str, model: Path, digests: Digests, download: bool = False) -> Path:
    """Return the folder of the model before alignment: the stage's `base`, by default the run's model.

    Raises:
        ModelError: it is missing, or it is the run's model, which is already aligned.
    """
    from holdfast.weights.folders import find_model, fingerprint

    given = getattr(recipe, stage).base
    if given is None:
        return model
    folder = find_model(str(model_path(given)), None, download)
    if model.is_dir() and fingerprint(folder, digests) == fingerprint(model, digests):
        raise ModelError(
            f"{stage}.base ({given}) and model.path ({recipe.model.path}) are the same. Give the model "
            "before alignment as base."
        )
    return folder


def alignment_inputs(recipe: Recipe, stage: str, base: Path, digests: Digests) -> dict[str, Any]:
    """Return what a method of a stage may know about the alignment: the model before it, and what it changed.

    The LoRA of a stage is None if that stage does not run or trains all weights.

    Args:
        base: the folder of the model before alignment, from `find_base`.
    """
    aligned, trains = recipe.alignment is not None, recipe.trains("user")
    known = aligned or getattr(recipe, stage).base is not None

    def lora(stage: str) -> dict[str, Any] | None:
        stage = "alignment" if stage == "user" and trains == "continue" else stage
        found = recipe.lora(stage) if getattr(recipe, stage) is not None else None
        return None if found is None or recipe.trains(stage) == "full" else found.identity()

    return {
        "before_alignment": Content(base, digest_of(base, digests)) if known else None,
        "trains": trains,
        "aligns": recipe.trains("alignment") if aligned else None,
        "loras": {stage: lora(stage) for stage in ("user", "alignment")},
    }


def repair_inputs(recipe: Recipe, base: Path, digests: Digests) -> dict[str, Any]:
    """Return the inputs of a repair, except its method, its settings and the steps that it reads."""
    return {**alignment_inputs(recipe, "post_hoc", base, digests), "seed": recipe.seed}


def check(inputs: Inputs, machine: Machine) -> None:
    """Check the parameters of a repair, and run the method's own check.

    Raises:
        RecipeError, ModelError: the method refuses a parameter, or the repair is not possible.
    """
    method, settings = inputs["method"], inputs["settings"]
    try:
        if method.config is not None:
            method.config(**settings)
        if method.check is not None:
            method.check(planned(inputs), **settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{method.stages[-1]}.{method.name}: {error}.") from None


def planned(inputs: Inputs) -> Planned:
    """Return the facts about a repair that are known before training."""
    from holdfast.models.trained import adapted_modules

    described = inputs["model"]
    folder = described["base"].folder

    def modules(stage: str) -> set[str] | None:
        lora = inputs["loras"][stage] if "loras" in inputs else None
        return None if lora is None else adapted_modules(folder, lora, described["trust_remote_code"])

    return Planned(
        model=folder,
        base=inputs["before_alignment"],
        trains=inputs["trains"],
        aligns=inputs["aligns"],
        find_modules=modules,
    )


def rows(recipe: Recipe, data: Mapping[str, str]) -> dict[str, str]:
    """Return the method's data steps by name ("train_dataset", ...); `data` holds them by role."""
    wanted = {*recipe.needs("post_hoc"), *recipe.may_use("post_hoc")}
    return {name: data[role] for name, role in ROWS.items() if name in wanted and role in data}


def apply(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write a changed copy of a stage's weights, under the same name ("adapter" or "model")."""
    from holdfast.models.dtypes import used_dtype

    for rest in folder.iterdir():  # left by a run that was stopped
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
        refusal=made_in(inputs["refusal_adapter"]) if "refusal_adapter" in wanted else None,
        seed=inputs["seed"],
        device=machine.device,
        dtype=used_dtype(described["base"].folder, described["dtype"], machine.device),
        load_rows={name: partial(rows_of, step) for name, step in inputs["rows"].items()},
        load_tokenizer=partial(tokenizer_of, described) if "tokenizer" in wanted else None,
    )
    return {"repair": method.apply(given, **inputs["settings"])}
