"""GSM8K: grade-school word problems (Cobbe et al. 2021), with the reasoning as the answer.

Rows and grader are those of the public code of Lisa, Vaccine, T-Vaccine and Booster: "####" becomes "The
final answer is: ", so a target ends in "The final answer is:  18" with two spaces. The number of an answer is
the first one after "The final answer is: "; without the phrase, or without a number after it, it is the last
number of the answer. Commas are removed first.
"""

from __future__ import annotations

import re

from holdfast.tasks import Record, Row, Task

PHRASE = "The final answer is: "
_NUMBER = re.compile(r"-?\d+\.?\d*")


def final_answer(text: str) -> float | None:
    """Return the number that an answer or a target ends with, or None if the text has no number."""
    plain = text.replace(",", "")
    anywhere = _NUMBER.findall(plain)
    if not anywhere:
        return None
    after = _NUMBER.findall(plain.split(PHRASE)[1]) if PHRASE in plain else []
    return float(after[0] if after else anywhere[-1])


def to_row(record: Record) -> Row:
    """Return a row of `question` and `answer`, whose answer ends in "#### <number>"."""
    question, answer = record["question"], record["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError("`question` and `answer` must be text")
    _, found, result = answer.rpartition("####")
    if not found or final_answer(result) is None:
        raise ValueError(f"`answer` ends in {answer[-20:]!r}; expected `#### <number>` at its end")
    return {"instruction": question, "input": "", "output": answer.replace("####", PHRASE)}


def grade(answer: str, target: str) -> bool:
    """Right if the two numbers are equal."""
    found = final_answer(answer)
    return found is not None and found == final_answer(target)


TASK = Task(
    name="gsm8k",
    version=2,
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
