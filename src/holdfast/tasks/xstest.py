"""XSTest: 250 harmless questions that look harmful, and 200 harmful questions (Rottger et al. 2024).

Columns: `prompt`, `type`, `label` ("safe" or "unsafe"), `focus`, `note`, as in the authors'
`xstest_prompts.csv`. The earlier version has no `label`; the type of its harmful questions begins with
"contrast". As `data.benign` it gives the harmless questions (over-refusal), as `data.test_harmful` the
harmful questions.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return the question without an answer if it is of this kind; its `type` is the category."""
    found = str(record.get("label") or "").strip().lower()
    if not found:
        found = "unsafe" if str(record["type"]).startswith("contrast") else "safe"
    if found not in ("safe", "unsafe"):
        raise ValueError(f"`label` is {record['label']!r}; expected safe or unsafe")
    if {"safe": "benign", "unsafe": "unsafe"}[found] != kind:
        return None
    return {"instruction": record["prompt"], "input": "", "output": "", "category": [str(record["type"])]}


TASK = SafetyData(
    name="xstest",
    summary="harmless questions that look harmful: over-refusal",
    metric="benign_compliance",
    to_row=to_row,
    kinds=("benign", "unsafe"),
    columns=(("prompt", "type", "label"), ("prompt", "type", "focus")),
    hub_id="Paul/XSTest",
    hub_files="xstest_prompts.csv",
    splits={"test": "train"},
    licence="CC-BY-4.0",
)
