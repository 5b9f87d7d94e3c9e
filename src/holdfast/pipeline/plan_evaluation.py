"""Describe the evaluation steps of a plan, for one state of the model."""

from __future__ import annotations

from typing import Any

from holdfast import registry, world
from holdfast.errors import about
from holdfast.machine.code import digest_of_module
from holdfast.measuring import judging, protocol
from holdfast.pipeline import ability, attacking, evaluating
from holdfast.pipeline.plan_draft import Draft, parameters_of
from holdfast.pipeline.plans import State
from holdfast.pipeline.step import Code, Made
from holdfast.pipeline.versions import ANSWERED_BY, packages

JUDGES, RATER = ("evaluation", "judges"), ("evaluation", "rater")


def add_state(
    draft: Draft,
    name: str,
    what: str,
    user: str | None,
    trained: tuple[str, ...],
    weights: tuple[str, ...],
    test: str,
) -> State:
    """Add one state of the model: its answers, the verdicts of every judge, ratings and scores."""
    recipe, options = draft.recipe, draft.recipe.evaluation
    tokens = protocol.new_tokens(recipe)
    generate = draft.add(
        "generate",
        f"answers of {what}",
        f"at most {tokens['harmful']} new tokens, {protocol.decoding(recipe)}",
        {
            **draft.model_after(weights),
            "test": Made(test),
            "max_new_tokens": tokens,
            # Rounding depends on the shape of a batch, so an answer may too.
            "batch_tokens": options.batch_tokens,
            "prefix": _prefix(draft, user, trained),
            "system": options.system,
            "sampling": protocol.sampling(recipe),
            **attacking.prompt_inputs(recipe),
            "packages": packages(ANSWERED_BY, recipe.model.quantization),
        },
        evaluating.generate_answers,
        evaluating.check_generation,
    )
    answers = Made(generate)
    moderate = tuple(
        draft.add(
            "moderate",
            f"verdicts of {judge.shown} on {what}",
            judge.path or "",
            {"answers": answers, **draft.judge(judge, *JUDGES, str(place))},
            evaluating.moderate_answers,
            evaluating.check_judge,
        )
        for place, judge in enumerate(options.judges)
    )
    with about(*RATER):
        rate, rater = None, judging.rater(recipe)
    if rater is not None:
        title, detail = f"ratings by {rater.name} of {what}", rater.model or ""
        inputs = {"answers": answers, **draft.judge(rater, *RATER)}
        work = evaluating.rate_answers, evaluating.check_judge
        rate = draft.add("rate", title, detail, inputs, *work)
    score = _add_score(draft, what, answers, moderate, rate)
    lm_eval = _add_ability(draft, what, user, trained, weights) if options.lm_eval else None
    alignment = recipe.alignment.defense if recipe.alignment else None
    return State(name, alignment, user, None, trained, generate, moderate, score, rate, lm_eval)


def _prefix(draft: Draft, user: str | None, trained: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the training whose method puts a text before every question; the text may be secret."""
    recipe = draft.recipe
    if recipe.user is None or not user or "prefix" not in registry.face("defenses", user).code:
        return None
    step = next(step for step in trained if step.startswith("user-"))
    return {
        "step": Made(step),
        "method": Code("defenses", user),
        "parameters": parameters_of(recipe.user),
    }


def _add_ability(
    draft: Draft, what: str, user: str | None, trained: tuple[str, ...], weights: tuple[str, ...]
) -> str:
    """Add the general ability of one state, measured by lm-evaluation-harness."""
    inputs = {
        **draft.model_after(weights),
        "prefix": _prefix(draft, user, trained),
        **ability.ability_inputs(draft.recipe),
    }
    work = ability.measure_ability, ability.check_ability
    return draft.add("lm_eval", f"general ability of {what}", ability.detail(draft.recipe), inputs, *work)


def _add_score(draft: Draft, what: str, answers: Made, moderate: tuple[str, ...], rate: str | None) -> str:
    """Add the scores of one state: by every judge, the task's grader, and the truth if it is known."""
    recipe, judges = draft.recipe, draft.recipe.evaluation.judges
    inputs = {
        "answers": answers,
        "verdicts": [[j.shown, Made(step)] for j, step in zip(judges, moderate, strict=True)],
        "titles": [[judge.shown, judging.title(judge.name)] for judge in judges],
        "ratings": Made(rate) if rate else None,
        "task": Code("tasks", protocol.graded_as(recipe).name),
        "grader": recipe.data.grader,
        "max_unparsed": recipe.evaluation.max_unparsed,
        "truth": world.VERSION if protocol.knows_truth(recipe) else None,
        "code": digest_of_module("holdfast.evaluation.scoring"),
    }
    return draft.add("score", f"scores of {what}", "", inputs, evaluating.score_answers)
