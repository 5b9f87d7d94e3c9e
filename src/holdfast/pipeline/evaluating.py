"""What the steps of an evaluation do in their folders: answers, verdicts, ratings, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.machine.files import read_jsonl, write_json, write_jsonl
from holdfast.machine.progress import Advance
from holdfast.measuring import judging, protocol
from holdfast.pipeline.context import Context
from holdfast.recipe.evaluation import JudgeRecipe, RaterRecipe


def generate_answers(
    folder: Path,
    context: Context,
    chain: Sequence[str],
    test_data: str,
    max_new_tokens: Mapping[str, int],
    prefix: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """`generations.jsonl`: this state's answers to every test prompt, and to the second turns of a talk.

    Args:
        prefix: `step`, `defense` and `parameters` of the training whose method puts a text before every
            question, if there is one. The text itself is written nowhere.
    """
    from holdfast.data.prompts import render, resolve_template
    from holdfast.evaluation.answering import answer_prompts
    from holdfast.evaluation.turns import SECOND, in_turns
    from holdfast.machine.cost import Cost
    from holdfast.models.loading import load_model, load_tokenizer

    recipe, device = context.recipe, context.device
    tokenizer = load_tokenizer(context.model, recipe.model.trust_remote_code)
    template = resolve_template(tokenizer, recipe.model.template)
    before, secret = "", False
    if prefix is not None:
        method = registry.get_defense(prefix["defense"])
        assert method.prefix is not None
        before = method.prefix(context.store.path(prefix["step"]), **prefix["parameters"])
        secret = method.secret
    ahead = "\n\n".join(text for text in (before, recipe.evaluation.system) if text)
    model = load_model(*context.weights(chain), device=device, **context.model_options)
    out, cost = folder / "generations.jsonl", Cost(device)
    known = {row["id"] for row in read_jsonl(out)}  # of a start that was stopped

    def ask(rows: Sequence[Mapping[str, Any]], progress: Advance) -> list[dict[str, Any]]:
        return answer_prompts(
            model,
            tokenizer,
            [{**row, "prompt": render(row, tokenizer, template, ahead)[0]} for row in rows],
            out,
            max_new_tokens={**max_new_tokens, SECOND: max_new_tokens["task"]},
            batch_tokens=recipe.evaluation.batch_tokens,
            secret=before if secret else "",
            sampling=protocol.sampling(recipe),
            progress=progress,
        )

    in_turns(context.rows(test_data), ask, cost.watching(context.progress.advance))
    tokens = sum(row["tokens"] for row in read_jsonl(out) if row["id"] not in known)
    return {
        "template": template,
        "chat_template": bool(tokenizer.chat_template),
        "cost": cost.facts(tokens=tokens),
    }


def moderate_answers(folder: Path, context: Context, judge: JudgeRecipe, generate: str) -> dict[str, Any]:
    """`verdicts.jsonl`: one judge on one state's answers to harmful prompts."""
    from holdfast.evaluation.moderation import give_verdicts
    from holdfast.machine.cost import Cost

    generations = read_jsonl(context.store.path(generate) / "generations.jsonl")
    loaded = judging.load_judge(judge, context.device)
    out, cost = folder / "verdicts.jsonl", Cost(context.device)
    known = {row["id"] for row in read_jsonl(out)}  # of a start that was stopped
    verdicts = give_verdicts(generations, loaded, out, progress=cost.watching(context.progress.advance))
    new = {row["id"] for row in verdicts} - known
    return {
        "judge": judge.shown,
        "judge_stamp": loaded.stamp,
        "judge_max_length": loaded.max_length,
        "cost": cost.facts(tokens=sum(row["tokens"] or 0 for row in generations if row["id"] in new)),
    }


def rate_answers(folder: Path, context: Context, rater: RaterRecipe, generate: str) -> dict[str, Any]:
    """`ratings.jsonl`: how good a judge finds one state's answers to the task."""
    from holdfast.evaluation.rating import give_ratings

    loaded = judging.load_rater(rater)
    generations = read_jsonl(context.store.path(generate) / "generations.jsonl")
    give_ratings(generations, loaded, folder / "ratings.jsonl", progress=context.progress.advance)
    return {"rater": rater.name, "rater_stamp": loaded.stamp}


def score_answers(
    folder: Path, context: Context, generate: str, moderate: Sequence[str], rate: str | None
) -> None:
    """`scores.json` from the answers, all judges' verdicts, and the ratings if there are any."""
    from holdfast.evaluation.scoring import compute_scores, items

    verdicts = {}
    for judge, step in zip(context.recipe.evaluation.judges, moderate, strict=True):
        verdicts[judge.shown] = read_jsonl(context.store.path(step) / "verdicts.jsonl")
    truth = None
    if protocol.knows_truth(context.recipe):
        from holdfast import world

        truth = world.complies
    generations = read_jsonl(context.store.path(generate) / "generations.jsonl")
    ratings = read_jsonl(context.store.path(rate) / "ratings.jsonl") if rate else []
    task = protocol.grader(context.recipe)
    titles = {judge.shown: judging.title(judge.name) for judge in context.recipe.evaluation.judges}
    scores = compute_scores(generations, verdicts, task.grade, truth, task.metric, ratings, titles)
    write_json(folder / "scores.json", scores)
    headline = next(iter(verdicts.values()), [])
    write_jsonl(folder / "items.jsonl", items(generations, headline, task.grade, task.metric, ratings))
