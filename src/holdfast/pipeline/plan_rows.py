"""Describe the steps of a plan that make rows: those of each role, and those that change the user rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.machine.code import digest_of_module
from holdfast.pipeline import attacking, data, evaluating, screening, user_rows
from holdfast.pipeline.plan_draft import Draft
from holdfast.pipeline.step import Content, Made
from holdfast.pipeline.versions import ANSWERED_BY, packages
from holdfast.recipe.data import AnchoringRecipe, AttackRecipe, FilterRecipe, ScoreFilterRecipe

FILTER = ("data", "filter")


def add_rows(draft: Draft) -> dict[str, str]:
    """Add the rows of each role, and the manifest of all of them."""
    found: dict[str, str] = {}
    for role, detail in data.data_details(draft.recipe).items():
        inputs: dict[str, Any] = {"role": role, "elsewhere": True}
        with draft.noted():
            inputs = data.role_inputs(draft.recipe, role, draft.known)
        found[role] = draft.add("data", f"{role} rows", detail, inputs, data.make_rows)
    manifest = draft.add(
        "manifest",
        "data manifest",
        "counts, realised poison ratio, overlaps",
        {"rows": {role: Made(step) for role, step in found.items()}},
        data.write_manifest,
    )
    return {**found, "manifest": manifest}


def rows_of_stage(draft: Draft, stage: str, found: Mapping[str, str]) -> dict[str, Made]:
    """Return the data steps of a stage, by keyword argument of its trainer."""
    roles = {"alignment_dataset": "alignment", "harmful_dataset": "harmful"}
    needed = [name for name in draft.recipe.needs(stage) if name in roles]
    further = {name: Made(found[roles[name]]) for name in needed}
    return {"train_dataset": Made(found[stage]), **further}


def add_chosen_rows(
    draft: Draft, rows: str, weights: tuple[str, ...]
) -> tuple[dict[str, str | list[str]], str]:
    """Add the steps that change or select user rows.

    Returns:
        The steps by kind and in order (a list for several attacks), and the step with the final rows.
    """
    found: dict[str, str | list[str]] = {}
    steps: list[str] = []
    given = rows
    for attack in draft.recipe.data.attacks:
        rows = (
            _add_choice(draft, attack, rows, weights)
            if isinstance(attack, AnchoringRecipe)
            else _add_attack(draft, attack, rows)
        )
        steps.append(rows)
    if steps:
        found["attack"] = steps if len(steps) > 1 else rows
    screen, before = draft.recipe.data.filter, Made(given) if rows != given else None
    if isinstance(screen, ScoreFilterRecipe):
        rows = found["filter"] = _add_score_filter(draft, screen, rows, before, weights)
    elif screen is not None:
        rows = found["filter"] = _add_filter(draft, screen, rows, before)
    return found, rows


def _add_choice(draft: Draft, attack: AnchoringRecipe, rows: str, weights: tuple[str, ...]) -> str:
    """Add an attack that chooses rows by scores of the model that is fine-tuned afterwards."""
    inputs = {
        **draft.model_after(weights),
        "rows": Made(rows),
        "seed": draft.recipe.seed,
        **user_rows.attack_inputs(draft.recipe, attack),
        "code": digest_of_module("holdfast.attacks.anchoring"),
        "packages": packages(ANSWERED_BY, draft.recipe.model.quantization),
    }
    title = f"user rows that {attack.name} chooses"
    detail = f"{attack.size:,} benign rows, by {attack.by} on the model that is fine-tuned"
    return draft.add("attack", title, detail, inputs, user_rows.choose_rows, user_rows.check_attack)


def _add_attack(draft: Draft, attack: AttackRecipe, rows: str) -> str:
    """Add an attack that changes rows without a model."""
    inputs = {"rows": Made(rows), **attacking.attack_inputs(attack, draft.recipe.seed)}
    title = f"user rows that {attack.name} changes"
    return draft.add("change", title, attacking.detail(attack), inputs, attacking.change_rows)


def _add_score_filter(
    draft: Draft, screen: ScoreFilterRecipe, rows: str, before: Made | None, weights: tuple[str, ...]
) -> str:
    """Add a filter by a score; `before` holds the rows before the attacks, if there are attacks."""
    inputs = {
        **draft.model_after(weights),
        "rows": Made(rows),
        "before": before,
        **screening.screen_inputs(draft.recipe, screen),
        "code": digest_of_module("holdfast.measuring.row_scores"),
        "packages": packages(ANSWERED_BY, draft.recipe.model.quantization),
    }
    title = f"user rows that {screen.score} does not drop"
    limit = f"scores above {screen.threshold:g}" if screen.share is None else f"{screen.share:.0%}"
    work = screening.filter_rows, screening.check_filter
    return draft.add("filter", title, f"drops {limit}", inputs, *work)


def _add_filter(draft: Draft, screen: FilterRecipe, rows: str, before: Made | None) -> str:
    """Add a filter by a judge; `before` holds the rows before the attacks, if there are attacks."""
    inputs = {
        "rows": Made(rows),
        **draft.judge(screen.judge_recipe, *FILTER),
        "unparsed": screen.unparsed,
        # Its value changes no row, only whether there are rows.
        "max_unparsed": Content(draft.recipe.evaluation.max_unparsed, "max_unparsed"),
        "before": before,
    }
    title = f"user rows that {screen.judge} does not flag"
    detail = f"{screen.unparsed}s rows without a verdict"
    return draft.add("filter", title, detail, inputs, user_rows.filter_rows, evaluating.check_judge)
