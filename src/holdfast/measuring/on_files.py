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
from holdfast.errors import DataError, HoldfastError, RecipeError, nearest
from holdfast.evaluation.moderation import left_out
from holdfast.machine.files import write_json, write_jsonl
from holdfast.machine.outputs import check_results, written
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.store import provenance
from holdfast.measuring import checks
from holdfast.measuring.answer_files import (
    Rows,
    beside,
    claim,
    judged_answers,
    learn_refusals,
    made_by,
    origin,
    rated_answers,
    read_answers,
    read_whole,
)
from holdfast.recipe.evaluation import RaterRecipe
from holdfast.tasks import METRICS, Metric
from holdfast.tasks.graders import GRADERS, adapted


def moderate(
    generations: str | Path,
    out: str | Path,
    *,
    judge: str = "keyword",
    device: str = "auto",
    max_unparsed: float = 0.05,
    progress: Advance = nobody,
    **options: Any,
) -> Rows:
    """Judge the answers to harmful prompts, or resume judging; returns all rows of `out` (JSONL).

    Args:
        generations: a file from `generate`, or rows with `id`, `set` ("harmful"), `instruction`, `answer`.
        judge: the name of a judge (`holdfast list judges`).
        max_unparsed: the share of answers without a verdict (unparsed) above which the judge has failed.
        options: options of the judge: path, threshold, max_length, ...

    Raises:
        StepFailed: too many answers are unparsed; their verdicts are kept in `out`.
        RecipeError: no judge has that name. DataError: there are no answers to harmful prompts.
        OutputError: `out` contains verdicts of another judge or on other answers.
    """
    from holdfast.evaluation import moderation as engine
    from holdfast.measuring import judging

    rows, _ = read_answers(Path(generations))
    if not any(row["set"] == "harmful" for row in rows):
        raise DataError(f"{generations} has no answers to harmful prompts (rows with set: harmful).")
    loaded = judging.ready(judge, device, options)
    with claim(Path(out), {"judge": judge, "judge_stamp": loaded.stamp, "answers": judged_answers(rows)}):
        found = engine.give_verdicts(rows, loaded, Path(out), progress=progress)
        learn_refusals(Path(out), found)
    engine.check_parsed(rows, found, judge=judge, out=Path(out), max_unparsed=max_unparsed)
    return found


def rate(
    generations: str | Path,
    out: str | Path,
    *,
    judge: str,
    task: str | None = None,
    max_unparsed: float = 0.05,
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
        max_unparsed: the share of answers without a rating above which the judge has failed.
        options: options of the judge: model, base_url, max_calls, ...

    Raises:
        RecipeError: no judge has that name. DataError: there are no answers to a task.
        StepFailed: the server does not answer, or too many answers have no rating; the ratings are kept.
        OutputError: `out` contains ratings of another judge or of other answers.
    """
    from holdfast.evaluation import rating as engine
    from holdfast.measuring import judging

    rows, _ = read_answers(Path(generations))
    if not engine.talks(rows):
        raise DataError(f"{generations} has no answers to a task (rows with set: task).")
    named = judging.checked(RaterRecipe, judge, options)
    asked = tasks.find(task or (made_by(Path(generations)) or {}).get("task") or "own")
    if isinstance(asked, tasks.Task) and asked.grade is None:
        judging.check_rater(named, asked)
    judging.check_judge(named)
    loaded = judging.load_rater(named)
    with claim(Path(out), {"judge": judge, "judge_stamp": loaded.stamp, "answers": rated_answers(rows)}):
        found = engine.give_ratings(rows, loaded, Path(out), progress=progress)
        learn_refusals(Path(out), found)
    engine.check_rated(found, rows, judge=judge, out=Path(out), max_unparsed=max_unparsed)
    return found


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
        grader: another grader for the same rows: exact, contains, number, rouge1, or judge (the `ratings`).
        out: a JSON file for the scores.
        items: a JSONL file for the score of each answer, which `compare` reads.

    Raises:
        DataError: the verdicts or ratings are on other answers; a task or grader is given, but there are no
            answers to a task. RecipeError: no task has that name.
        OutputError: `out` or `items` is a folder or one of the files that are read, or cannot be written.
        HoldfastError: verdicts or ratings are given, but not one has a value. The files are written.
    """
    from holdfast.evaluation import scoring as engine

    check_results([out, items], [generations, *verdicts, ratings])
    rows, places = read_answers(Path(generations))
    made = made_by(Path(generations)) or {}
    name = task or made.get("task") or "own"
    task_itself = tasks.find(name)
    if not isinstance(task_itself, tasks.Task):
        raise RecipeError(f"'{name}' is not a user task and grades no answers (see holdfast list tasks).")
    if grader is not None and grader not in GRADERS:
        raise RecipeError(f"Unknown grader '{grader}'.{nearest(grader, GRADERS)}")
    if (task or grader) and not any(row["set"] == "task" for row in rows):
        option = f"task {task}" if task else f"grader {grader}"
        raise DataError(
            f"{generations} has no answers to a task, so the {option} grades nothing. Leave it out."
        )
    known = adapted(task_itself, grader)
    rated: Rows = []
    if ratings is not None:
        known, rated = _rated(known, Path(ratings), generations, rows)
    if known.grade is not None:
        checks.check_targets(Path(generations), rows, places)
    judged, titles = _verdicts(verdicts, generations, rows)
    scores = {
        **engine.compute_scores(rows, judged, known.grade, metric=known.metric, ratings=rated, titles=titles),
        "task": known.stamp,
        "provenance": provenance(),
    }
    scores["not_measured"] = _not_measured(scores, rows)
    if names := left_out(rows):
        scores["answered_without"] = names
    if out is not None:
        with written(out):
            write_json(Path(out), scores)
    if items is not None:
        found = engine.items(rows, next(iter(judged.values()), []), known.grade, known.metric, rated)
        with written(items):
            write_jsonl(Path(items), found)
    for name, given, unparsed in (
        ("harmful_score", verdicts, "unparsed"),
        ("task_score", ratings, "task_unparsed"),
    ):
        if given and scores[name] is None:
            raise HoldfastError(
                f"{generations} has no {name}: {scores[unparsed]} answers are unparsed, none has a value. "
                "Use another judge or model."
            )
    return scores


def _not_measured(scores: dict[str, Any], rows: Rows) -> list[str]:
    """Return the scores without a value although there are answers for them."""
    named = {"harmful_score": "harmful", "task_score": "task", "benign_compliance": "benign"}
    sets = {row["set"] for row in rows}
    return [name for name, kind in named.items() if kind in sets and scores[name] is None]


def _verdicts(
    paths: Sequence[str | Path], generations: str | Path, rows: Rows
) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return verdicts and titles by judge. Raises DataError for verdicts on other answers than `rows`."""
    from holdfast.measuring import judging

    harmful = {row["id"] for row in rows if row["set"] == "harmful"}
    judged: dict[str, Rows] = {}
    titles: dict[str, str] = {}
    labels = _labels([Path(path) for path in paths])
    for path, label in zip(map(Path, paths), labels, strict=True):
        found, places = read_whole(path)
        again = f"Run holdfast moderate {generations} with another --out."
        made = origin(path)
        if made.get("answers") not in (None, judged_answers(rows)):
            raise DataError(f"{path} holds verdicts on other answers than those in {generations}. {again}")
        checks.check_verdicts(path, found, places, harmful)
        if len(found) != len(harmful):
            raise DataError(
                f"{path} holds {len(found)} verdicts on the {len(harmful)} answers to harmful prompts in "
                f"{generations}. Run the same holdfast moderate again to get the rest."
            )
        judged[label] = found
        if made.get("judge"):
            titles[label] = judging.title(made["judge"])
    return judged, titles


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file of verdicts: its judge's, or the judge's stamp if two have one name.

    Raises:
        DataError: two files are of the same judge with the same stamp, or one file is given twice.
    """
    made = [origin(path) for path in paths]
    short = [one.get("judge") or path.stem for one, path in zip(made, paths, strict=True)]
    labels = [
        name if short.count(name) == 1 else str(one.get("judge_stamp") or path)
        for name, one, path in zip(short, made, paths, strict=True)
    ]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise DataError(
                f"{paths[labels.index(label)]} and {paths[i]} are both verdicts of {label}. Give one of them."
            )
    return labels


def _rated(task: tasks.Task, path: Path, generations: str | Path, rows: Rows) -> tuple[tasks.Task, Rows]:
    """Return `task` with the metric of the ratings' judge, and the ratings.

    Raises:
        DataError: the ratings are of other answers, or it is not known what they measure.
    """
    rated, places = read_whole(path)
    made, answered = origin(path), {row["id"] for row in rows if row["set"] == "task"}
    if made.get("answers") not in (None, rated_answers(rows)):
        raise DataError(
            f"{path} holds ratings of other answers than those in {generations}. Run holdfast rate "
            f"{generations} with another --out."
        )
    checks.check_ratings(path, rated, places, answered)
    if len(rated) != len(answered):
        raise DataError(
            f"{path} holds {len(rated)} ratings of the {len(answered)} answers to the task in {generations}. "
            "Run the same holdfast rate again to get the rest."
        )
    if not made.get("judge"):
        raise DataError(
            f"{path} has no {beside(path).name} beside it, which says which judge gave the ratings and on "
            "which scale. Keep the two files together, or rate the answers with holdfast rate."
        )
    metric = registry.face("judges", made["judge"]).facts.get("metric", "win_rate")
    if task.grade is None and task.metric != metric:
        raise DataError(
            f"{path} holds ratings by {made['judge']} ({metric}); {task.name} needs {task.metric}."
        )
    known = METRICS.get(metric, Metric(metric))
    low, high = (0, 1) if known.unit == "percent" else (1, 10)
    checks.check_scale(path, rated, places, low, high, known.title)
    if task.grade is not None:
        task = replace(task, name=f"{task.name}-judge", metric=metric, grade=None)
    return task, rated
