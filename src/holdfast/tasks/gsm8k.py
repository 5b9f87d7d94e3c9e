"""GSM8K: grade-school word problems (Cobbe et al. 2021), with the reasoning as the answer.

As in the papers' code, the closing "#### 18" is rewritten as "The final answer is: 18", and an answer is
right if the number after that phrase is the target's number.
"""

from __future__ import annotations

import re
from decimal import Decimal

from holdfast.tasks import Record, Row, Task

PHRASE = "The final answer is:"
# Digits with or without thousands separators; "1,00" and "1.2.3" are not valid numbers.
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")


def number(text: str) -> Decimal | None:
    """Return the number at the start of `text` ("$1,000.00 a day" is 1000), or None."""
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    word = re.sub(r"[$€£*]", "", word).rstrip(".,;:!?%)").replace("−", "-")
    if not _NUMBER.fullmatch(word) or not any(c.isdigit() for c in word):
        return None
    return Decimal(word.replace(",", ""))


def final_answer(text: str) -> Decimal | None:
    """Return the number after the first "The final answer is:", or None."""
    _, found, rest = text.partition(PHRASE)
    return number(rest) if found else None


def to_row(record: Record) -> Row:
    """Return a row of `question` and `answer`, whose answer ends in "#### <number>"."""
    question, answer = record["question"], record["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError("`question` and `answer` must be text")
    reasoning, found, result = answer.rpartition("####")
    if not found or number(result) is None:
        raise ValueError(f"`answer` ends in {answer[-20:]!r}; expected `#### <number>` at its end")
    return {"instruction": question, "input": "", "output": f"{reasoning}{PHRASE} {result.strip()}"}


def grade(answer: str, target: str) -> bool:
    """Right if both texts have a final answer and the two numbers are equal."""
    found = final_answer(answer)
    return found is not None and found == final_answer(target)


TASK = Task(
    name="gsm8k",
    summary="grade-school maths word problems, graded by the final number",
    grade=grade,
    to_row=to_row,
    columns=(("question", "answer"),),
    hub_id="openai/gsm8k",
    hub_config="main",
    licence="MIT",
    max_new_tokens=200,
    test_size=1000,
)
