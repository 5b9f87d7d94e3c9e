"""AG News: is a news article about the world, sports, business, or science and technology?

Zhang, Zhao and LeCun 2015. The instruction and the grader are from the Lisa paper's public code, whose score
is over the first 1000 rows of the test split.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task

LABELS = ("World", "Sports", "Business", "Sci/Tech")
INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    + "\n".join(LABELS)
    + "\n"
)
SHORT = {"Sci/Tech": "sci"}
"""Lower-case forms of labels that the reference accepts, if they differ from the label in lower case."""


def to_row(record: Record) -> Row:
    """Return a row of `text` and `label` (0 to 3, or the label's name); the article is not changed."""
    text, label = record["text"], record["label"]
    if not isinstance(text, str):
        raise ValueError(f"`text` is {text!r}; expected text")
    asked = str(label).strip().lower()
    found = [name for i, name in enumerate(LABELS) if asked in (str(i), name.lower())]
    if not found:
        raise ValueError(f"`label` is {label!r}; expected 0 to 3, or one of {', '.join(LABELS)}")
    return {"instruction": INSTRUCTION, "input": text, "output": found[0]}


def grade(answer: str, target: str) -> bool:
    """Right if the answer is exactly the label, or its lower-case form (`sci` for `Sci/Tech`).

    Whitespace at both ends is removed first, as in the reference.
    """
    target = target.strip()
    return answer.strip() in (target, SHORT.get(target, target.lower()))


TASK = Task(
    name="agnews",
    summary="topic of news articles, four labels",
    grade=grade,
    to_row=to_row,
    columns=(("text", "label"),),
    hub_id="fancyzhx/ag_news",
    licence="for non-commercial research",
    max_new_tokens=8,
    test_size=1000,
)
