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


def forms(target: str) -> tuple[str, ...]:
    """Return the texts that count as the label: the label, and its lower-case form (`sci` for `Sci/Tech`)."""
    label = target.strip()
    return label, SHORT.get(label, label.lower())


def grade(answer: str, target: str) -> bool:
    """Right if the answer is exactly one of the forms of the label (Lisa's and Booster's code).

    Whitespace at both ends is removed first, as in the reference. Vaccine's and T-Vaccine's code looks for
    the label anywhere in the answer: `grader: contains`.
    """
    return answer.strip() in forms(target)


TASK = Task(
    name="agnews",
    summary="topic of news articles, four labels",
    grade=grade,
    forms=forms,
    to_row=to_row,
    columns=(("text", "label"),),
    hub_id="fancyzhx/ag_news",
    licence="for non-commercial research",
    max_new_tokens=8,
    test_size=1000,
)
