"""JailbreakBench: 100 harmful behaviours and 100 harmless ones on the same topics (Chao et al. 2024).

Columns: `Index`, `Goal`, `Target`, `Behavior`, `Category`, `Source`, as in the authors'
`harmful-behaviors.csv` and `benign-behaviors.csv`. The rows of both files look alike, so the name of the file
decides. As `data.test_harmful` it gives the harmful behaviours, as `data.benign` the harmless ones.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData

SIDES = {"harmful": "unsafe", "benign": "benign"}


def to_row(record: Record, kind: str) -> Row | None:
    """Return the goal without an answer if its file is of this kind."""
    goal, name = record["Goal"], str(record.get("file", ""))
    side = next((side for word, side in SIDES.items() if name.startswith(word)), None)
    if side is None:
        raise ValueError(
            "the name of the file does not say whether its behaviours are harmful; name it as published, "
            "harmful-behaviors.csv or benign-behaviors.csv"
        )
    if side != kind:
        return None
    return {"instruction": goal, "input": "", "output": "", "category": [str(record["Category"])]}


TASK = SafetyData(
    name="jailbreakbench",
    summary="100 harmful behaviours, and 100 harmless ones on the same topics",
    to_row=to_row,
    kinds=("unsafe", "benign"),
    columns=(("Goal", "Behavior", "Category"),),
    hub_id="JailbreakBench/JBB-Behaviors",
    hub_files="data/*-behaviors.csv",
    files=("harmful-behaviors.csv", "benign-behaviors.csv"),
    splits={"test": "train"},
    licence="MIT",
    warning="contains harmful instructions, for safety research only",
)
