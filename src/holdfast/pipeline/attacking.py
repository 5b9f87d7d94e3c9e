"""Attacks that change rows: the step that changes the user rows, and the harmful prompts of the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast import registry
from holdfast.attacks import Attack
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.pipeline.data import rows_of
from holdfast.pipeline.step import Code, Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.recipe.data import AttackRecipe

HARMFUL_ROWS = "harmful_rows"
"""The field of the protocol stamp with the attacker's budget."""


def attack_inputs(attack: AttackRecipe, seed: int) -> dict[str, Any]:
    """Return the inputs of an attack: its code, its parameters and the seed of the run."""
    return {"attack": Code("attacks", attack.name), "parameters": attack.parameters(), "seed": seed}


def detail(attack: AttackRecipe) -> str:
    """Return the text that `plan` shows for an attack."""
    text = registry.face("attacks", attack.name).facts.get("plan", "")
    return str(text.format(**attack.parameters()))


def change_rows(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the changed rows to `rows.jsonl`.

    Raises:
        DataError: the attack changes no row, or leaves none.
    """
    attack: Attack = inputs["attack"]
    assert attack.change is not None
    given = rows_of(inputs["rows"])
    seed = derive_seed(inputs["seed"], "attack", attack.name)
    made = attack.change(given, seed=seed, **inputs["parameters"])
    if not made:
        raise DataError(f"data.attack {attack.name} leaves none of the {len(given)} user rows.")
    known = {row["id"]: row for row in given}
    datasets.write_rows(folder / "rows.jsonl", datasets.numbered(map(dict, made)))
    facts = {
        "name": attack.name,
        "parameters": inputs["parameters"],
        "rows": len(given),
        "kept": len(made),
        "changed": sum(row != known.get(row["id"]) for row in made),
        "harmful": sum(row["source"] == "harmful" for row in made),
    }
    return {"attack": facts}


def prompt_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return the attacks that change the harmful prompts of the test; {} without `evaluation.attacked`."""
    if not recipe.evaluation.attacked:
        return {}
    return {"attacks": [attack_inputs(attack, recipe.seed) for attack in recipe.data.prompt_attacks()]}


def asked(inputs: Inputs) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Return the function that changes a test row; every row of a set other than "harmful" stays as it is."""
    attacks: Sequence[Mapping[str, Any]] = inputs.get("attacks", [])

    def changed(row: Mapping[str, Any]) -> Mapping[str, Any]:
        for one in attacks if row["set"] == "harmful" else []:
            seed = derive_seed(one["seed"], "attack", one["attack"].name)
            row = one["attack"].prompt(row, seed=seed, **one["parameters"])
        return row

    return changed


def stamp(recipe: Recipe, chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of the protocol stamp for attacks that change rows or prompts; {} without them.

    Args:
        chosen: the facts of the attacks' steps, in order.
    """
    found: dict[str, Any] = {}
    if chosen and "harmful" in chosen[-1]:
        found[HARMFUL_ROWS] = chosen[-1]["harmful"]
    if recipe.evaluation.attacked:
        found["prompts_changed_by"] = "; ".join(map(_shown, recipe.data.prompt_attacks()))
    return found


def _shown(attack: AttackRecipe) -> str:
    given = ", ".join(f"{name}: {value}" for name, value in attack.parameters().items())
    return f"{attack.name} ({given})" if given else attack.name
