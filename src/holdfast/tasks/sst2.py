"""SST-2 of GLUE: is a film review's sentence positive or negative?

Socher et al. 2013, Wang et al. 2019. The instruction and the grader are from the public code of the Lisa,
Vaccine and T-Vaccine papers. The score is over GLUE's validation split (872 sentences), because its test
labels are not public.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task

INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
LABELS = {"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"}


def to_row(record: Record) -> Row:
    """Return a row of `sentence` and `label` (0, 1, "negative" or "positive") with an unchanged sentence."""
    sentence, label = record["sentence"], record["label"]
    if not isinstance(sentence, str):
        raise ValueError(f"`sentence` is {sentence!r}; expected text")
    output = LABELS.get(str(label).strip().lower())
    if output is None:
        raise ValueError(f"`label` is {label!r}; expected 0, 1, negative or positive")
    return {"instruction": INSTRUCTION, "input": sentence, "output": output}


def forms(target: str) -> tuple[str, ...]:
    """Return the texts that count as the label: `positive` and `Positive`, or `negative` and `Negative`."""
    label = target.strip().lower()
    return label, label.capitalize()


def grade(answer: str, target: str) -> bool:
    """Right if the answer is exactly one of the forms of the label (Lisa's and Booster's code).

    Whitespace at both ends of the answer is removed first, as in the reference. Anything else besides the
    word ("positive.", "POSITIVE", a second line) makes the answer wrong. Vaccine's and T-Vaccine's code looks
    for the label anywhere in the answer: `grader: contains`.
    """
    return answer.strip() in forms(target)


TASK = Task(
    name="sst2",
    summary="sentiment of film reviews, two labels",
    grade=grade,
    forms=forms,
    to_row=to_row,
    columns=(("sentence", "label"),),
    hub_id="stanfordnlp/sst2",
    splits={"train": "train", "test": "validation"},
    licence="for research; see https://nlp.stanford.edu/sentiment",
    max_new_tokens=8,
    test_size=872,
)
