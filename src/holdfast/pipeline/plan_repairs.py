"""Describe the steps of a plan that change weights: hardening, repairs, and the attack on weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from holdfast import registry
from holdfast.pipeline import repairing, weight_attacks
from holdfast.pipeline.chain import with_folders
from holdfast.pipeline.plan_draft import Draft, parameters_of
from holdfast.pipeline.plan_evaluation import add_state
from holdfast.pipeline.plan_training import add_adapter, add_harmful_adapter, add_training
from holdfast.pipeline.plans import State
from holdfast.pipeline.step import Code, Made
from holdfast.pipeline.versions import ANSWERED_BY, REPAIRED_BY, packages
from holdfast.recipe.stages import POST_HOC_TRAINING, StageRecipe, Training


def add_hardening(draft: Draft, part: StageRecipe, aligned: str) -> str:
    """Add the step in which a method changes what plain SFT aligned, before the user stage."""
    face, recipe = registry.face("defenses", part.defense), draft.recipe
    parameters = parameters_of(part)
    inputs = {
        "model": draft.model["model"],
        **repairing.hardening_inputs(recipe, draft.folder, draft.digests),
        "method": Code("defenses", part.defense),
        "settings": with_folders(parameters, face, draft.digests),
        "tuned": Made(aligned),
        "aligned": None,
        "rows": {},
        "packages": packages(REPAIRED_BY),
    }
    title = f"aligned weights changed by {face.facts.get('label', part.defense)}"
    work = repairing.apply, repairing.check
    return draft.add("harden", title, repairing.shown(parameters), inputs, *work)


def add_repair(
    draft: Draft,
    repair: repairing.Repair,
    trained: tuple[str, ...],
    weights: tuple[str, ...],
    aligned: tuple[str, ...],
    rows: Mapping[str, str],
) -> State:
    """Add a repair of the user stage's weights (the last of `weights`), and its evaluation."""
    recipe = draft.recipe
    assert recipe.user is not None
    assert recipe.post_hoc is not None
    trains = "trainer" in registry.face("defenses", recipe.post_hoc.defense).code
    if trains:
        step = _add_patch(draft, repair, weights, rows)
    else:
        step = _add_change(draft, repair, weights, aligned, rows)
    chain = (*trained, step), (*weights[:-1], step)
    state = add_state(draft, repair.name, repair.name, recipe.user.defense, *chain, rows["test"])
    return replace(state, post_hoc=recipe.post_hoc.defense, post_hoc_parameters=repair.parameters)


def _add_patch(
    draft: Draft, repair: repairing.Repair, weights: tuple[str, ...], rows: Mapping[str, str]
) -> str:
    """Add a post-hoc method that trains the user stage's weights further, on the alignment rows."""
    recipe = draft.recipe.post_hoc
    assert recipe is not None
    part = StageRecipe(defense=recipe.defense, training=recipe.training or Training(), **repair.settings)
    given = {"train_dataset": Made(rows["alignment"])}
    return add_training(draft, "post_hoc", part, POST_HOC_TRAINING, given, weights)


def _add_change(
    draft: Draft,
    repair: repairing.Repair,
    weights: tuple[str, ...],
    aligned: tuple[str, ...],
    rows: Mapping[str, str],
) -> str:
    """Add a post-hoc method that writes changed weights without training."""
    recipe = draft.recipe
    assert recipe.post_hoc is not None
    face = registry.face("defenses", recipe.post_hoc.defense)
    inputs = {
        "model": draft.model["model"],
        **repairing.repair_inputs(recipe, draft.base("post_hoc"), draft.digests),
        "method": Code("defenses", recipe.post_hoc.defense),
        "settings": with_folders(repair.settings, face, draft.digests),
        "tuned": Made(weights[-1]),
        "aligned": Made(aligned[0]) if aligned else None,
        "rows": {name: Made(step) for name, step in repairing.rows(recipe, rows).items()},
        "packages": packages(REPAIRED_BY),
    }
    buffer = add_harmful_adapter(draft, "post_hoc", rows, aligned)
    if buffer is not None:
        refusal = add_adapter(draft, "refusal_adapter", rows["alignment"], aligned, buffer)
        inputs["refusal_adapter"] = Made(refusal)
    title, detail = f"repair with {repairing.label(recipe)}", repairing.shown(repair.given)
    return draft.add("post_hoc", title, detail, inputs, repairing.apply, repairing.check)


def add_weight_attack(draft: Draft, state: State, weights: tuple[str, ...], test: str) -> State:
    """Add the attack on the weights of a state, and the evaluation of the result."""
    attack = draft.recipe.post_hoc_attack
    assert attack is not None
    inputs: dict[str, Any] = {"elsewhere": True}
    with draft.noted():
        inputs = weight_attacks.attack_inputs(draft.recipe)
    inputs = {
        **draft.model_after(weights),
        **inputs,
        "packages": packages(tuple({*ANSWERED_BY, *REPAIRED_BY}), draft.recipe.model.quantization),
    }
    name = f"{state.name}, then {attack.label[0].lower()}{attack.label[1:]}"
    work = weight_attacks.change_weights, weight_attacks.check_attack
    detail = repairing.shown(attack.parameters())
    step = draft.add("tamper", f"{attack.label} of {state.name}", detail, inputs, *work)
    found = add_state(draft, name, name, state.user, (*state.chain, step), (step,), test)
    return replace(
        found,
        post_hoc=state.post_hoc,
        post_hoc_parameters=state.post_hoc_parameters,
        tampered=attack.name,
    )
