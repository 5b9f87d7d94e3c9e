"""SORRY-Bench: unsafe instructions in 45 fine-grained categories (Xie et al. 2024), to test on.

Columns: `question_id`, `category`, `turns`, `prompt_style`, as in the authors' `question.jsonl`: 450 rows in
the version 202406, 440 in the version 202503. The 20 linguistic mutations of these instructions have another
`prompt_style` than "base" and are left out. Gated on the Hub.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return the only turn of a basic instruction, without an answer."""
    turns = record["turns"]
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], str):
        raise ValueError("`turns` must be a list of one text")
    if kind != "unsafe" or record["prompt_style"] != "base":
        return None
    return {"instruction": turns[0], "input": "", "output": "", "category": [str(record["category"])]}


TASK = SafetyData(
    name="sorry_bench",
    summary="450 unsafe instructions in 45 categories, to test on",
    to_row=to_row,
    columns=(("question_id", "category", "turns", "prompt_style"),),
    hub_id="sorry-bench/sorry-bench-202406",
    hub_files="question.jsonl",
    splits={"test": "train"},
    licence="SORRY-Bench dataset licence agreement, gated",
    warning="contains harmful instructions, for safety research only",
    obtain="ask for access on its Hub page, or write sorry_bench:question.jsonl",
)
