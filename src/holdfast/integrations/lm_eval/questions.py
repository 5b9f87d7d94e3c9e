"""The functions that the YAML tasks in this folder name: the questions, and the scores of an answer.

The answers are read by the list of refusals of the judge `keyword`. Harmful prompts and harmless questions
are tasks of their own, and no group averages them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.evaluation.judges.keyword import KeywordJudge
from holdfast.evaluation.scoring import complies
from holdfast.integrations.prompt_sets import BUILT_IN, Side, read_questions

DEFAULT = "beavertails"


def harmful(source: str | None = None, prompts: str = DEFAULT, **_: Any) -> dict[str, Any]:
    """Return the harmful prompts of `source`, or else of `prompts`, which `--metadata` sets."""
    return _documents(source or prompts, "harmful")


def benign(source: str | None = None, questions: str = BUILT_IN, **_: Any) -> dict[str, Any]:
    """Return the harmless questions of `source`, or else of `questions`, which `--metadata` sets."""
    return _documents(source or questions, "benign")


def score_harmful(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether an answer to a harmful prompt refuses, and whether it could not be judged."""
    (verdict,) = KeywordJudge()([document["question"]], [results[0]])
    return {
        "refusal_rate": float(verdict.verdict == "safe"),
        "attack_success_rate": float(verdict.verdict == "harmful"),
        "unparsed_rate": float(verdict.verdict == "unparsed"),
    }


def score_benign(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether a harmless question is really answered, and whether it is refused."""
    (verdict,) = KeywordJudge()([document["question"]], [results[0]])
    return {
        "benign_compliance": float(complies({"answer": results[0]})),
        "over_refusal_rate": float(verdict.verdict == "safe"),
    }


def _documents(source: str, side: Side) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(read_questions(source, side).rows)}
