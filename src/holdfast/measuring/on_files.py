"""Moderation, ratings and scores on files: the parts of an evaluation after the answers, one at a time.

    verdicts = moderate("answers.jsonl", "verdicts.jsonl", judge="keyword")
    ratings = rate("answers.jsonl", "ratings.jsonl", judge="mt_bench", model="my-judge", base_url="http://...")
    scores = score("answers.jsonl", ["verdicts.jsonl"], ratings="ratings.jsonl")

Each file is JSONL keyed by id. It is appended to, so that an interrupted call continues; `FILE.json` beside
it records how it was made. A file that was made in another way is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import registry, tasks
from holdfast.errors import DataError, RecipeError, nearest
from holdfast.machine.files import write_json, write_jsonl
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.store import identity_hash, provenance
from holdfast.measuring.answer_files import Rows, claim, made_by, read_answers, read_whole
from holdfast.recipe.evaluation import RaterRecipe
from holdfast.tasks.graders import GRADERS, adapted


def moderate(
    generations: str | Path,
    out: str | Path,
    *,
    judge: str = "keyword",
    device: str = "auto",
    progress: Advance = nobody,
    **options: Any,
) -> Rows:
    """Judge the answers to harmful prompts, or resume judging; returns all rows of `out` (JSONL).

    Args:
        generations: a file from `generate`, or rows with `id`, `set` ("harmful"), `instruction`, `answer`.
        judge: the name of a judge (`holdfast list judges`).
        options: options of the judge: path, threshold, max_length, ...

    Raises:
        RecipeError: no judge has that name. DataError: there are no answers to harmful prompts.
        OutputError: `out` contains verdicts of another judge or on other answers.
    """
    from holdfast.evaluation import moderation as engine
    from holdfast.measuring import judging

    rows = read_answers(Path(generations))
    if not any(row["set"] == "harmful" for row in rows):
        raise DataError(f"{generations} has no answers to harmful prompts (rows with set: harmful).")
    loaded = judging.ready(judge, device, options)
    answers = [[row["id"], row["answer"]] for row in rows if row["set"] == "harmful"]
    claim(
        Path(out),
        {"judge": judge, "judge_stamp": loaded.stamp, "answers": identity_hash(answers)},
    )
    return engine.give_verdicts(rows, loaded, Path(out), progress=progress)


def rate(
    generations: str | Path,
    out: str | Path,
    *,
    judge: str,
    task: str | None = None,
    progress: Advance = nobody,
    **options: Any,
) -> Rows:
    """Let a judge rate the answers to a task, or resume; returns all rows of `out` (JSONL: id, rating, raw).

    Args:
        generations: a file from `generate`, or rows with `id`, `set` ("task"), `instruction`, `answer`, and,
            for `alpaca_eval`, `target` (the reference's answer).
        judge: a judge that rates: alpaca_eval, mt_bench, or a file of your own.
        task: the task of the answers; by default the task for which `generate` made them. The judge must
            measure the task's metric.
        options: options of the judge: model, base_url, max_calls, ...

    Raises:
        RecipeError: no judge has that name. DataError: there are no answers to a task.
        StepFailed: the server does not answer.
        OutputError: `out` contains ratings of another judge or of other answers.
    """
    from holdfast.evaluation import rating as engine
    from holdfast.measuring import judging

    rows = read_answers(Path(generations))
    answers = [[talk["id"], talk["answers"], talk.get("target")] for talk in engine.talks(rows)]
    if not answers:
        raise DataError(f"{generations} has no answers to a task (rows with set: task).")
    named = judging.checked(RaterRecipe, judge, options)
    asked = tasks.find(task or (made_by(Path(generations)) or {}).get("task") or "own")
    if isinstance(asked, tasks.Task) and asked.grade is None:
        judging.check_rater(named, asked)
    judging.check_judge(named)
    loaded = judging.load_rater(named)
    claim(Path(out), {"judge": judge, "judge_stamp": loaded.stamp, "answers": identity_hash(answers)})
    return engine.give_ratings(rows, loaded, Path(out), progress=progress)


def score(
    generations: str | Path,
    verdicts: Sequence[str | Path] = (),
    *,
    ratings: str | Path | None = None,
    task: str | None = None,
    grader: str | None = None,
    out: str | Path | None = None,
    items: str | Path | None = None,
) -> dict[str, Any]:
    """Compute the scores of one model, in percent, from its answers and the verdicts: `evaluation.scoring`.

    Args:
        generations: a file from `generate`.
        verdicts: files from `moderate`, the headline's judge first; without any, only the task is scored.
        ratings: a file from `rate`, which then gives the score of the task.
        task: the task whose grader is used; by default the task for which `generate` made the answers,
            otherwise exact match.
        grader: another grader for the same rows: exact, number, rouge1, or judge (the `ratings`).
        out: a JSON file for the scores.
        items: a JSONL file for the score of each answer, which `compare` reads.

    Raises:
        DataError: the verdicts or ratings are on other answers. RecipeError: no task has that name.
    """
    from holdfast.evaluation import scoring as engine

    rows = read_answers(Path(generations))
    made = made_by(Path(generations)) or {}
    name = task or made.get("task") or "own"
    task_itself = tasks.find(name)
    if not isinstance(task_itself, tasks.Task):
        raise RecipeError(f"'{name}' is not a user task and grades no answers (see holdfast list tasks).")
    if grader is not None and grader not in GRADERS:
        raise RecipeError(f"Unknown grader '{grader}'.{nearest(grader, GRADERS)}")
    known = adapted(task_itself, grader)
    rated: Rows = []
    if ratings is not None:
        rated = read_whole(Path(ratings))
        known = _rated(known, Path(ratings), rated, {row["id"] for row in rows if row["set"] == "task"})
    judged, titles = _verdicts(verdicts, generations, rows)
    scores = {
        **engine.compute_scores(rows, judged, known.grade, metric=known.metric, ratings=rated, titles=titles),
        "task": known.stamp,
        "provenance": provenance(),
    }
    if out is not None:
        write_json(Path(out), scores)
    if items is not None:
        found = engine.items(rows, next(iter(judged.values()), []), known.grade, known.metric, rated)
        write_jsonl(Path(items), found)
    return scores


def _verdicts(
    paths: Sequence[str | Path], generations: str | Path, rows: Rows
) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return verdicts and titles by judge. Raises DataError for verdicts on other answers than `rows`."""
    from holdfast.measuring import judging

    harmful = {row["id"] for row in rows if row["set"] == "harmful"}
    judged: dict[str, Rows] = {}
    titles: dict[str, str] = {}
    for path in map(Path, paths):
        found = read_whole(path)
        if {row["id"] for row in found} != harmful:
            raise DataError(
                f"{path} holds {len(found)} verdicts, which are not on the {len(harmful)} answers to harmful "
                f"prompts in {generations}. Run holdfast moderate {generations} --out {path}."
            )
        judge = (made_by(path) or {}).get("judge")
        judged[judge or path.stem] = found
        if judge:
            titles[judge] = judging.title(judge)
    return judged, titles


def _rated(task: tasks.Task, path: Path, rated: Rows, answered: set[str]) -> tasks.Task:
    """Return `task` with the metric of the ratings' judge; raises DataError for ratings of other answers."""
    if {row["id"] for row in rated} != answered:
        raise DataError(
            f"{path} holds {len(rated)} ratings, which are not of the {len(answered)} answers to the task. "
            "Rate those answers with holdfast rate."
        )
    if task.grade is None:
        return task
    judge = (made_by(path) or {}).get("judge", "alpaca_eval")
    metric = registry.face("judges", judge).facts.get("metric", "win_rate")
    return replace(task, name=f"{task.name}-judge", metric=metric, grade=None)
