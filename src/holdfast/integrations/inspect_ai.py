"""Prompt sets and judges for inspect_ai, which finds them by its entry point: tasks and scorers.

    inspect eval holdfast/harmful_prompts -T prompts=harmbench -T judge=wildguard --model hf/my-model
    inspect eval holdfast/benign_questions --model hf/my-model

inspect_ai imports this file; nothing in Holdfast does. Harmful prompts and harmless questions are tasks of
their own. An answer without a verdict is unscored, never safe. The decoding is that of the command: `-M
do_sample=false` decodes a Hugging Face model greedily, `--temperature 0` one behind an API.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import anyio.to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Metric, Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from holdfast.evaluation.judges import LoadedJudge
from holdfast.evaluation.scoring import complies
from holdfast.integrations.prompt_sets import BUILT_IN, Side, read_questions
from holdfast.measuring import judging
from holdfast.recipe.evaluation import JudgeRecipe

MEAN: list[Metric] = [mean(), stderr()]
_ONE_AT_A_TIME = threading.Lock()


@task
def harmful_prompts(
    prompts: str = "beavertails",
    judge: str = "keyword",
    most: int | None = None,
    max_tokens: int = 512,
    **options: Any,
) -> Task:
    """Harmful prompts of a set, judged by one of Holdfast's judges; the score is the harmful score.

    Args:
        prompts: the name of a data set (`holdfast list tasks`), "world", a file, `name:FILE` or a Hub id.
        judge: the name of a judge (`holdfast list judges`).
        most: at most this many prompts.
        max_tokens: the maximum number of new tokens of an answer.
        options: options of the judge: path, threshold, model, base_url, ...
    """
    return _task(prompts, "harmful", most, max_tokens, [harmful_score(judge, **options), refusal()])


@task
def benign_questions(questions: str = BUILT_IN, most: int | None = None, max_tokens: int = 512) -> Task:
    """Harmless questions, many of which sound alarming: how many are really answered.

    Args:
        questions: as `prompts` of `harmful_prompts`; "built-in" are Holdfast's own.
        most, max_tokens: as for `harmful_prompts`.
    """
    return _task(questions, "benign", most, max_tokens, [benign_compliance(), refusal()])


@scorer(metrics=MEAN)
def harmful_score(judge: str = "keyword", **options: Any) -> Scorer:
    """Return a scorer with the verdict of one of Holdfast's judges: 1 if the answer is harmful, 0 if safe.

    Args:
        judge, options: as for `harmful_prompts`.
    """
    judging.checked(JudgeRecipe, judge, options)

    async def score(state: TaskState, target: Target) -> Score:
        loaded = await anyio.to_thread.run_sync(_loaded, judge, tuple(sorted(options.items())))
        asked, answer = state.input_text, state.output.completion
        (verdict,) = await anyio.to_thread.run_sync(_judged, loaded, asked, answer)
        facts = {
            "judge": loaded.stamp,
            "verdict": verdict.verdict,
            "score": verdict.score,
            "raw": verdict.raw,
        }
        if verdict.verdict == "unparsed":
            return Score.unscored(reason="grader_failed", answer=answer, metadata=facts)
        return Score(value=float(verdict.verdict == "harmful"), answer=answer, metadata=facts)

    return score


@scorer(metrics=MEAN)
def refusal() -> Scorer:
    """Return a scorer that is 1 if an answer refuses, by the list of refusals of the judge `keyword`."""
    return _by_text("refusal", lambda loaded, asked, answer: _judged(loaded, asked, answer)[0].verdict)


@scorer(metrics=MEAN)
def benign_compliance() -> Scorer:
    """Return a scorer that is 1 if a harmless question is really answered: no refusal, and no gibberish."""
    return _by_text(
        "benign_compliance", lambda _, __, answer: "safe" if complies({"answer": answer}) else "harmful"
    )


def _by_text(name: str, read: Callable[[LoadedJudge, str, str], str]) -> Scorer:
    """Return a scorer that reads only the text: 1 for "safe", 0 for "harmful"."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        verdict = read(_loaded("keyword", ()), state.input_text, answer)
        if verdict == "unparsed":
            return Score.unscored(reason="grader_failed", answer=answer)
        return Score(value=float(verdict == "safe"), answer=answer)

    return score


def _task(source: str, side: Side, most: int | None, max_tokens: int, scorers: list[Scorer]) -> Task:
    found = read_questions(source, side, most=most)
    samples = [
        Sample(id=row["id"], input=row["question"], metadata={"category": row["category"]})
        for row in found.rows
    ]
    return Task(
        dataset=MemoryDataset(samples, name=source),
        solver=generate(),
        scorer=scorers,
        config=GenerateConfig(max_tokens=max_tokens),
        metadata={"side": side, "prompt_set": dict(found.source)},
    )


@cache
def _loaded(judge: str, options: tuple[tuple[str, Any], ...]) -> LoadedJudge:
    """Load a judge once for all samples."""
    with _ONE_AT_A_TIME:
        return judging.ready(judge, "auto", dict(options))


def _judged(loaded: LoadedJudge, asked: str, answer: str) -> list[Any]:
    """Return one verdict; a model answers one call at a time."""
    with _ONE_AT_A_TIME:
        return loaded([asked], [answer])
