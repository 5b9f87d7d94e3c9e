"""Build the steps of a recipe. This is the only file that knows the order of the stages.

Every step is named by the hash of its inputs. Running again therefore runs only the missing steps, and
recipes that have a stage in common share its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from holdfast.errors import InputError
from holdfast.machine.digests import Digests
from holdfast.machine.store import now
from holdfast.pipeline import repairing
from holdfast.pipeline.plan_draft import Draft
from holdfast.pipeline.plan_evaluation import add_state
from holdfast.pipeline.plan_repairs import add_hardening, add_repair, add_weight_attack
from holdfast.pipeline.plan_rows import add_chosen_rows, add_rows, rows_of_stage
from holdfast.pipeline.plan_training import add_harmful_adapter, add_training
from holdfast.pipeline.plans import Plan, State
from holdfast.recipe import Recipe
from holdfast.recipe.stages import ALIGNMENT_TRAINING, USER_TRAINING


def plan(
    recipe: Recipe,
    *,
    download: bool = False,
    digests: Digests | None = None,
    today: str | None = None,
    partial: bool = False,
    device: str = "auto",
    processes: Mapping[str, int] | None = None,
    known: dict[Any, Any] | None = None,
) -> Plan:
    """Return the steps of `recipe`. Reads files to identify their content; writes nothing, imports no torch.

    Args:
        download: download a Hub model that is not in the local cache.
        digests: caches the SHA-256 of large files between calls.
        today: the date for a chat template that writes one, if the recipe does not set
            `model.template_date`: that of the run's first start. The recipe of the plan holds it.
        partial: also plan with models and data sets of the Hub that are not on this machine. Such a plan
            names them in `elsewhere`, and cannot be run.
        device: the device that computes, which decides about `model.dtype: auto`. torch is imported only for
            a model that is stored with 16 bits.
        processes: by stage ("alignment", "user"), the number of processes that train together; by default
            those that were started together with this one, at every stage.
        known: what earlier plans read from files; plans that are made together share it, and no other.

    Raises:
        DataError, ModelError: a file or a model is missing or cannot be used.
    """
    from holdfast.models.device import check_name

    check_name(device)
    today, digests = today or now()[:10], digests or Digests()
    try:
        return _staged(Draft(recipe, download, digests, today, partial, device, processes, known))
    except InputError as error:
        raise error.after(recipe.where(error.key)) from None


def _staged(draft: Draft) -> Plan:
    """Add the steps of every stage in order, and return the plan."""
    rows = add_rows(draft)
    states = []
    recipe = draft.recipe
    trained: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()  # the trainings whose weights form the model
    if recipe.alignment is not None:
        given = rows_of_stage(draft, "alignment", rows)
        trained = (add_training(draft, "alignment", recipe.alignment, ALIGNMENT_TRAINING, given, ()),)
        if repairing.hardens(recipe.alignment):
            trained = (*trained, add_hardening(draft, recipe.alignment, trained[0]))
        weights = trained[-1:]
    name = "base" if recipe.alignment is None else "aligned"
    states.append(add_state(draft, name, f"the {name} model", None, trained, weights, rows["test"]))
    if recipe.user is not None and recipe.attack_sweep is not None:
        for point in recipe.attack_sweep.each():
            draft.recipe, draft.at = recipe.at(point), f" at {point.shown}"
            tuned = _tuned(draft, rows, trained, weights)
            states += [replace(state, point=point.given()) for state in tuned]
        draft.recipe, draft.at = recipe, ""
    elif recipe.user is not None:
        states += _tuned(draft, rows, trained, weights)
    elif recipe.post_hoc_attack is not None:
        states.append(add_weight_attack(draft, states[0], weights, rows["test"]))
    dtype = draft.model["model"]["dtype"].digest
    steps, found = tuple(draft.steps.values()), tuple(states)
    return Plan(recipe, steps, found, rows["manifest"], draft.folder, tuple(draft.elsewhere), dtype)


def _tuned(
    draft: Draft, rows: Mapping[str, str], trained: tuple[str, ...], aligned: tuple[str, ...]
) -> list[State]:
    """Add the user stage on top of the weights of the steps `aligned`, and what comes after it."""
    recipe, test = draft.recipe, rows["test"]
    assert recipe.user is not None
    chosen, last = add_chosen_rows(draft, rows["user"], aligned)
    rows = {**rows, "user": last}
    buffer = add_harmful_adapter(draft, "user", rows, aligned)
    step = add_training(
        draft, "user", recipe.user, USER_TRAINING, rows_of_stage(draft, "user", rows), aligned, buffer
    )
    trained = (*trained, step)
    below = {"new": aligned, "continue": aligned[:-1], "full": ()}[recipe.trains("user")]
    weights = (*below, step)
    state = recipe.name, "the fine-tuned model", recipe.user.defense
    states = [add_state(draft, *state, trained, weights, test)]
    for repair in repairing.repairs(recipe):
        states.append(add_repair(draft, repair, trained, weights, aligned, rows))
    if recipe.post_hoc_attack is not None:
        states += [add_weight_attack(draft, one, (*below, one.chain[-1]), test) for one in states]
    return [replace(state, chosen=chosen) for state in states]
