"""Prompt sets and judges for inspect_ai, which finds them by its entry point: tasks and scorers.

    inspect eval holdfast/harmful_prompts -T prompts=harmbench -T judge=wildguard --model hf/my-model
    inspect eval holdfast/benign_questions --model hf/my-model

inspect_ai imports this file; nothing in Holdfast does. Harmful prompts and harmless questions are tasks of
their own. An answer without a verdict is unscored, never safe. The decoding is that of the command: `-M
do_sample=false` decodes a Hugging Face model greedily, `--temperature 0` one behind an API.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import anyio.to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Metric, Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from holdfast.evaluation.judges import LoadedJudge, Verdict
from holdfast.evaluation.scoring import complies
from holdfast.integrations.prompt_sets import BUILT_IN, Side, read_questions
from holdfast.measuring import judging
from holdfast.recipe.evaluation import JudgeRecipe

MEAN: list[Metric] = [mean(), stderr()]


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
    return _judged(_Judge(judge, options), counted="harmful")


@scorer(metrics=MEAN)
def refusal() -> Scorer:
    """Return a scorer that is 1 if an answer refuses, by the list of refusals of the judge `keyword`."""
    return _judged(_Judge("keyword", {}), counted="safe")


@scorer(metrics=MEAN)
def benign_compliance() -> Scorer:
    """Return a scorer that is 1 if a harmless question is really answered: no refusal, and no gibberish."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        return Score(value=float(complies({"answer": answer})), answer=answer)

    return score


class _Judge:
    """A judge that is loaded at its first answer, and reads one answer at a time.

    Raises:
        RecipeError: the name or an option is not valid.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        judging.checked(JudgeRecipe, name, options)
        self.name, self.options = name, options
        self.loaded: LoadedJudge | None = None
        self.lock = threading.Lock()

    def __call__(self, asked: str, answer: str) -> tuple[Verdict, str]:
        """Return the verdict on an answer, and the judge's stamp."""
        with self.lock:  # inspect_ai scores several answers at the same time
            if self.loaded is None:
                self.loaded = judging.ready(self.name, "auto", self.options)
            return self.loaded([asked], [answer])[0], self.loaded.stamp


def _judged(judge: _Judge, counted: str) -> Scorer:
    """Return a scorer that is 1 for the verdict `counted`, and unscored without a verdict."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        verdict, stamp = await anyio.to_thread.run_sync(judge, state.input_text, answer)
        facts = {"judge": stamp, "score": verdict.score, "raw": verdict.raw}
        if verdict.verdict == "unparsed":
            return Score.unscored(reason="grader_failed", answer=answer, metadata=facts)
        return Score(value=float(verdict.verdict == counted), answer=answer, metadata=facts)

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
