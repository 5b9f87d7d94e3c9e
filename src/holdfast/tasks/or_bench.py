"""OR-Bench: 1,319 harmless questions that models often refuse, and 655 toxic ones (Cui et al. 2024).

Columns: `prompt`, `category`, as in the authors' `or-bench-hard-1k.csv`, `or-bench-toxic.csv` and
`or-bench-80k.csv`. The rows look alike, so the name of the file decides: only a file whose name contains
"toxic" holds harmful questions. As `data.benign` it gives the harmless questions (over-refusal).
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return the question without an answer if its file is of this kind."""
    side = "unsafe" if "toxic" in str(record.get("file", "")) else "benign"
    if side != kind:
        return None
    return {"instruction": record["prompt"], "input": "", "output": "", "category": [str(record["category"])]}


TASK = SafetyData(
    name="or_bench",
    summary="harmless questions that models often refuse (hard-1k), and toxic ones",
    metric="benign_compliance",
    to_row=to_row,
    kinds=("benign", "unsafe"),
    copies=(("prompt", "category"),),
    hub_id="bench-llm/or-bench",
    hub_files="or-bench-[ht]*.csv",
    files=("or-bench-hard-1k.csv", "or-bench-toxic.csv", "or-bench-80k.csv"),
    splits={"test": "train"},
    licence="CC-BY-4.0",
    warning="one part contains toxic questions, for safety research only",
)
