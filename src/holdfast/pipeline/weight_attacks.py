"""The attack on weights: nothing is trained; the weights that the stages made are merged and changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import InputError, RecipeError
from holdfast.machine.files import remove_tree
from holdfast.machine.seeds import derive_seed
from holdfast.pipeline.chain import loading, tokenizer_of, weights
from holdfast.pipeline.data import rendered, role_inputs, source
from holdfast.pipeline.step import Code, Inputs, Machine
from holdfast.pipeline.user_rows import MAX_LENGTH
from holdfast.recipe import Recipe
from holdfast.tasks.graders import adapted

BENIGN = ("task", "columns", "suffix", "user", "test", "skip_bad", "take")
"""The inputs of the user rows from which harmless prompts are taken if the recipe names no others."""


def attack_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return the inputs of the attack, except the weights. No prompt of the test is among its prompts."""
    data, attack = recipe.data, recipe.post_hoc_attack
    assert attack is not None
    held_out = data.harmful is not None and datasets.holds_out(data.harmful, data.test_harmful)
    user = {} if attack.harmless else role_inputs(recipe, "user")
    return {
        "attack": Code("attacks", attack.name),
        "parameters": attack.parameters(),
        "harmful": source(attack.harmful or data.harmful, "harmful"),
        "held_out_of": source(data.harmful, "harmful") if held_out else None,
        "test_prompts": recipe.evaluation.prompts if held_out else None,
        "harmless": source(attack.harmless, "user"),
        "benign": {name: user[name] for name in BENIGN if name in user},
        "prompts": attack.prompts,
        "max_length": MAX_LENGTH,
        "skip_bad": data.skip_bad,
        "seed": recipe.seed,
    }


def prompts(inputs: Inputs) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the harmful and the harmless prompts of the attack, drawn with the seed."""
    seed, skip_bad = inputs["seed"], inputs["skip_bad"]
    held = (
        {"harmful": inputs["held_out_of"], "prompts": inputs["test_prompts"]} if inputs["held_out_of"] else {}
    )
    harmful = datasets.harmful_rows(source=inputs["harmful"], seed=seed, skip_bad=skip_bad, **held).rows
    if inputs["harmless"] is not None:
        loaded = datasets.read_records(inputs["harmless"], role="user")
        harmless: Sequence[Any] = datasets.to_rows(loaded, role="user", prompts_only=True, skip_bad=skip_bad)
    else:
        given = dict(inputs["benign"])
        given["task"] = adapted(given["task"], columns=given.pop("columns"), suffix=given.pop("suffix"))
        harmless = datasets.user_rows(**given, seed=seed).rows

    def drawn(rows: Sequence[Any]) -> list[Mapping[str, Any]]:
        order = sorted(range(len(rows)), key=lambda i: (derive_seed(seed, "tamper", rows[i]["id"]), i))
        return [rows[i] for i in sorted(order[: inputs["prompts"]])]

    return drawn(harmful), drawn(harmless)


def change_weights(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the changed weights to `model`; adapters are added to the weights first, which are streamed."""
    from holdfast.weights.merge import merge

    for rest in folder.iterdir():  # left by a run that was stopped
        remove_tree(rest)
    described, attack = inputs["model"], inputs["attack"]
    base, adapters = weights(described["base"].folder, inputs["chain"])
    whole = base
    if adapters:
        whole = merge(base, adapters, folder / "merged").folder
    tokenizer = tokenizer_of(described)
    sets = [rendered(rows, tokenizer, inputs["template"]) for rows in prompts(inputs)]
    options = {name: value for name, value in loading(described).items() if name != "compose"}
    facts = attack.apply(
        whole,
        folder / "model",
        harmful=sets[0],
        harmless=sets[1],
        device=machine.device,
        max_length=inputs["max_length"],
        options=options,
        **inputs["parameters"],
    )
    if adapters:
        remove_tree(whole)
    return {"tampered": {"name": attack.name, "parameters": inputs["parameters"], **facts}}


def check_attack(inputs: Inputs, machine: Machine) -> None:
    """Check the prompts, the parameters, and that the attack is possible on the base model.

    Raises:
        InputError: one of them cannot be used.
    """
    attack = inputs["attack"]
    try:
        prompts(inputs)
        if attack.check is not None:
            attack.check(inputs["model"]["base"].folder, **inputs["parameters"])
    except InputError as error:
        raise error.at("post_hoc_attack") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"post_hoc_attack {attack.name}: {error}.").at("post_hoc_attack") from None
