"""AlpacaEval: a language model on a server says which of two answers is better; win rate over a reference.

Li et al. 2023, tatsu-lab/alpaca_eval; the prompt `alpaca_eval_clf` of its GPT-4 Turbo annotator (Apache-2.0),
word for word. Temperature 0. Where we differ: AlpacaEval draws one order of the two answers and weights the
reply by its token probabilities, which few servers return. We ask in both orders and take the mean, so a win
is 1, a loss is 0, and a model that always names the first answer gives 0.5. Not corrected for length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import DataError
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
    without,
)
from holdfast.evaluation.moderation import question

MARKERS = ("## Best Model Identifier", '"model_identifier"', '"""')


@dataclass(frozen=True)
class Pair:
    """An instruction, the answer to grade, and the reference answer."""

    instruction: str
    answer: str
    reference: str


class AlpacaEval:
    """Compares each answer with its reference, in both orders."""

    batch_size = WORKERS // 2

    def __init__(self, *, model: str, base_url: str | None = None, **limits: Any):
        self.server = Server(model, base_url, **{k: v for k, v in limits.items() if v is not None})
        self.prompt = (PROMPTS / "alpaca_eval.txt").read_text(encoding="utf-8")
        self.stamp = f"alpaca_eval@{model}/both orders"

    def messages(self, instruction: str, first: str, second: str) -> list[dict[str, str]]:
        """Return the messages that compare two answers."""
        messages = []
        for part in self.prompt.split("<|im_start|>")[1:]:
            role, content = part.split("\n", 1)
            content = content.split("<|im_end|>")[0].strip()
            texts = {"instruction": instruction, "output_1": first, "output_2": second}
            clean = {name: neutralise_all(text, MARKERS) for name, text in texts.items()}
            messages.append({"role": role, "content": fill(content, **clean)})
        return messages

    def __call__(self, pairs: Sequence[Pair]) -> list[Grade]:
        """Return 1 if the answer wins in both orders, 0 if it loses in both, 0.5 if the order decides."""
        return in_order(self.each(pairs))

    def each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Grade]]:
        """Yield the place of each pair and its grade as soon as both orders are answered."""
        questions = []
        for pair in pairs:
            questions.append(self.messages(pair.instruction, pair.answer, pair.reference))
            questions.append(self.messages(pair.instruction, pair.reference, pair.answer))
        replies = self.server.ask_each(questions, max_tokens=8)
        return grouped(replies, [i // 2 for i in range(len(questions))], lambda both: grade(*both))

    def rate(self, talks: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """Return a grade for each row; the data set's own answer (`target`) is the reference."""
        return in_order(self.rate_each(talks))

    def rate_each(self, talks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Grade]]:
        """Yield the place of each row and its grade; see `rate`."""
        for row in talks:
            if not row.get("target"):
                raise DataError(f"Row {row['id']} has no reference answer (target) to compare with.")
        return self.each([Pair(question(row), row["answers"][0], row["target"]) for row in talks])


def grade(forward: Reply, backward: Reply) -> Grade:
    """Grade from the better model's names in both orders: "m" is the first answer, "M" the second."""
    raw = [reply.whole for reply in (forward, backward)]
    names = [(reply.text or "").strip() for reply in (forward, backward)]
    left_out = without((forward, backward))
    if any(name not in ("m", "M") for name in names):
        return Grade(None, raw, left_out)
    return Grade(((names[0] == "m") + (names[1] == "M")) / 2, raw, left_out)


JUDGE = Judge(
    name="alpaca_eval",
    version="2",
    source="any OpenAI-compatible server; prompt: tatsu-lab/alpaca_eval",
    licence="prompt: Apache-2.0; the model's own",
    load=AlpacaEval,
    check=check,
    options=("model", "base_url", "requests_per_minute", "max_calls", "timeout"),
    needs=("model",),
    measures="quality",
    metric="win_rate",
    direction="higher",
)
