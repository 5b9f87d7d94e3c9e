"""MT-Bench: a language model on a server grades an answer from 1 to 10, after one or two turns.

Zheng et al., arXiv 2306.05685, section 3 (single answer grading). The four prompts are those of FastChat's
`judge_prompts.jsonl` (Apache-2.0), word for word; with a reference answer, as for mathematics, reasoning and
coding, the prompt that shows it is used. Temperature 0, at most 2048 tokens. Where we differ: two different
ratings in one reply, or a rating outside 1 to 10, give no grade; FastChat takes the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.evaluation.judges import Grade, Judge, neutralise_all
from holdfast.evaluation.judges.server import PROMPTS, WORKERS, Reply, Server, check, fill
from holdfast.evaluation.moderation import question

FRAME = (
    "[Instruction]", "[Question]", "[The Start of Assistant's Answer]", "[The End of Assistant's Answer]",
    "[The Start of Reference Answer]", "[The End of Reference Answer]", "### Reference answer:",
    "<|The Start of", "<|The End of",
)  # fmt: skip
MARKERS = (*FRAME, *(f"[[{rating}]]" for rating in range(1, 11)))


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
        return [grade(r) for r in self.server.ask_all([self.messages(t) for t in talks], max_tokens=2048)]

    def rate(self, talks: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """Return the mean of the grades of each row's turns; no grade if one of them has none."""
        asked = [(i, talk) for i, row in enumerate(talks) for talk in _turns(row)]
        grades: list[list[Grade]] = [[] for _ in talks]
        for (i, _), given in zip(asked, self([talk for _, talk in asked]), strict=True):
            grades[i].append(given)
        return [_mean(turns) for turns in grades]


def grade(reply: Reply) -> Grade:
    """Return the single rating in double brackets, or otherwise in single brackets."""
    if reply.text is None:
        return Grade(None, reply.reason)
    number = r"(\d+\.?\d*)"
    found = re.findall(rf"\[\[{number}\]\]", reply.text) or re.findall(rf"\[{number}\]", reply.text)
    ratings = {float(rating) for rating in found}
    if len(ratings) != 1 or not 1 <= min(ratings) <= 10:
        return Grade(None, reply.text)
    return Grade(ratings.pop(), reply.text)


def _turns(row: Mapping[str, Any]) -> list[Talk]:
    """Return the talk after each turn, with as many reference answers, if there are that many."""
    questions, references = row.get("turns") or [question(row)], row.get("reference") or []
    return [
        Talk(questions[:n], row["answers"][:n], references[:n] if len(references) >= n else None)
        for n in range(1, len(row["answers"]) + 1)
    ]


def _mean(turns: Sequence[Grade]) -> Grade:
    scores = [turn.score for turn in turns if turn.score is not None]
    raw = [{"score": turn.score, "raw": turn.raw} for turn in turns]
    return Grade(sum(scores) / len(scores) if len(scores) == len(turns) else None, raw)


JUDGE = Judge(
    name="mt_bench",
    version="1",
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
