"""BeaverTails (Ji et al. 2023): questions and answers, each labelled harmful or not in 14 categories.

It also reads the refusal files made from BeaverTails that RepNoise, Booster and T-Vaccine align on: the same
columns (the question may be called `instruction`) and a `refusal` in addition to the harmful `response`.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def is_safe(record: Record) -> bool:
    """Return the label; text such as "False" (a CSV cell) is accepted."""
    label = _BOOLEANS.get(str(record["is_safe"]).strip().lower())
    if label is None:
        raise ValueError(f"`is_safe` is {record['is_safe']!r}; expected true or false")
    return label


def category(record: Record) -> list[str]:
    """Return the names of the categories that apply, from {name: bool} or from a list of names."""
    value = record.get("category") or []
    if isinstance(value, dict):
        return [name for name, holds in value.items() if holds]
    if isinstance(value, list):
        return [str(name) for name in value]
    return [str(value)]


def to_row(record: Record, kind: str) -> Row | None:
    """Return the row for `kind`: "unsafe" and "safe" select by label, "refusal" uses the `refusal` column."""
    if kind == "refusal":
        if "refusal" not in record:
            raise ValueError("has no `refusal` column, which alignment rows of the kind 'refusal' need")
        answer = record["refusal"]
        if answer is None:
            return None
        if isinstance(answer, str):
            # The published files repeat the question before the refusal. The authors take the second part.
            _, *after = answer.split("\nAnswer: ")
            answer = after[0] if after else answer
    elif kind == "unsafe" and "is_safe" not in record and "refusal" in record:
        answer = record["response"]
    elif kind == "benign" or is_safe(record) != (kind == "safe"):
        return None
    else:
        answer = record["response"]
    prompt = record["prompt"] if "prompt" in record else record["instruction"]
    return {"instruction": prompt, "input": "", "output": answer, "category": category(record)}


TASK = SafetyData(
    name="beavertails",
    summary="questions with harmful and harmless answers, in 14 categories",
    to_row=to_row,
    kinds=("unsafe", "safe", "refusal"),
    columns=(
        ("prompt", "is_safe"),
        ("instruction", "is_safe"),
        ("prompt", "refusal"),
        ("instruction", "refusal"),
    ),
    hub_id="PKU-Alignment/BeaverTails",
    splits={"train": "30k_train", "test": "30k_test"},
    licence="CC-BY-NC-4.0",
    warning="contains offensive and harmful text, for safety research only; non-commercial use only",
)
