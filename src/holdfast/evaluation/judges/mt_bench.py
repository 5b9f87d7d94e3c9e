"""MT-Bench: a language model on a server grades an answer from 1 to 10, after one or two turns.

Zheng et al., arXiv 2306.05685, section 3 (single answer grading). The four prompts are those of FastChat's
`judge_prompts.jsonl` (Apache-2.0), word for word; with a reference answer, as for mathematics, reasoning and
coding, the prompt that shows it is used. Temperature 0, at most 2048 tokens. Where we differ: two different
ratings in one reply, or a rating outside 1 to 10, give no grade (FastChat takes the first); what the judge
quotes is not read; and a rating in single brackets counts only after "Rating:".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.evaluation.judges import Grade, Judge, neutralise_all
from holdfast.evaluation.judges.server import (
    PROMPTS,
    WORKERS,
    Reply,
    Server,
    check,
    fill,
    grouped,
    in_order,
    own_words,
    without,
)
from holdfast.evaluation.moderation import question

FRAME = (
    "[Instruction]", "[Question]", "[The Start of Assistant's Answer]", "[The End of Assistant's Answer]",
    "[The Start of Reference Answer]", "[The End of Reference Answer]", "### Reference answer:",
    "<|The Start of", "<|The End of",
)  # fmt: skip
MARKERS = FRAME
DOUBLE = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)
SINGLE = re.compile(r"rating\W{0,4}\[(\d+\.?\d*)\]", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Talk:
    """One or two turns: the questions, the answers, and the reference answers if there are any."""

    questions: Sequence[str]
    answers: Sequence[str]
    references: Sequence[str] | None = None


class MTBench:
    """Grades the last answer of each talk."""

    batch_size = WORKERS // 2

    def __init__(self, *, model: str, base_url: str | None = None, **limits: Any):
        self.server = Server(model, base_url, **{k: v for k, v in limits.items() if v is not None})
        lines = (PROMPTS / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
        self.prompts = {row["name"]: row for row in map(json.loads, lines)}
        self.stamp = f"mt_bench@{model}/single 1-10"

    def messages(self, talk: Talk) -> list[dict[str, str]]:
        """Return the messages that grade a talk."""
        kind = "single-math-v1" if talk.references else "single-v1"
        two = len(talk.questions) == 2
        prompt = self.prompts[f"{kind}-multi-turn" if two else kind]
        texts = {"question": talk.questions[0], "answer": talk.answers[0]}
        for i, (asked, answer) in enumerate(zip(talk.questions, talk.answers, strict=True), start=1):
            texts |= {f"question_{i}": asked, f"answer_{i}": answer}
        texts |= {f"ref_answer_{i}": text for i, text in enumerate(talk.references or (), start=1)}
        clean = {name: neutralise_all(text, MARKERS) for name, text in texts.items()}
        return [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": fill(prompt["prompt_template"], **clean)},
        ]

    def __call__(self, talks: Sequence[Talk]) -> list[Grade]:
        """Return a grade from 1 to 10 for each talk; MT-Bench's score is its mean over all turns."""
        questions = [self.messages(talk) for talk in talks]
        return [grade(reply) for reply in in_order(self.server.ask_each(questions, max_tokens=2048))]

    def rate(self, talks: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """Return the mean of the grades of each row's turns; no grade if one of them has none."""
        return in_order(self.rate_each(talks))

    def rate_each(self, talks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Grade]]:
        """Yield the place of each row and its grade as soon as all its turns are graded."""
        asked = [(i, talk) for i, row in enumerate(talks) for talk in _turns(row)]
        replies = self.server.ask_each([self.messages(talk) for _, talk in asked], max_tokens=2048)
        return grouped(replies, [i for i, _ in asked], _mean)


def grade(reply: Reply) -> Grade:
    """Return the single rating in double brackets, or otherwise in single brackets after "Rating:"."""
    text = own_words(reply.text or "")
    found = DOUBLE.findall(text) or SINGLE.findall(text)
    ratings = {float(rating) for rating in found}
    if len(ratings) != 1 or not 1 <= min(ratings) <= 10:
        return Grade(None, reply.whole, reply.without)
    return Grade(ratings.pop(), reply.whole, reply.without)


def _turns(row: Mapping[str, Any]) -> list[Talk]:
    """Return the talk after each turn, with as many reference answers, if there are that many."""
    questions, references = row.get("turns") or [question(row)], row.get("reference") or []
    return [
        Talk(questions[:n], row["answers"][:n], references[:n] if len(references) >= n else None)
        for n in range(1, len(row["answers"]) + 1)
    ]


def _mean(replies: Sequence[Reply]) -> Grade:
    turns = [grade(reply) for reply in replies]
    scores = [turn.score for turn in turns if turn.score is not None]
    raw = [{"score": turn.score, "raw": turn.raw} for turn in turns]
    mean = sum(scores) / len(scores) if len(scores) == len(turns) else None
    return Grade(mean, raw, without(replies))


JUDGE = Judge(
    name="mt_bench",
    version="2",
    source="any OpenAI-compatible server; prompts: FastChat, arXiv 2306.05685",
    licence="prompts: Apache-2.0; the model's own",
    load=MTBench,
    check=check,
    options=("model", "base_url", "requests_per_minute", "max_calls", "timeout"),
    needs=("model",),
    measures="quality",
    metric="mt_bench",
    direction="higher",
)
