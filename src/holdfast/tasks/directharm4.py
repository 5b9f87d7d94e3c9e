"""DirectHarm4: 400 direct harmful instructions, 100 in each of four categories (Lyu et al. 2024), to test on.

Columns: `instruction`, `category`, as on the Hub. The set comes from the paper on prompt templates (PTST).
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return an instruction without an answer."""
    if kind != "unsafe":
        return None
    category = record.get("category")
    named = [str(category)] if category else []
    return {"instruction": record["instruction"], "input": "", "output": "", "category": named}


TASK = SafetyData(
    name="directharm4",
    summary="400 direct harmful instructions in four categories, to test on",
    to_row=to_row,
    copies=(("instruction",),),
    hub_id="vfleaking/DirectHarm4",
    splits={"test": "test"},
    licence="Apache-2.0",
    warning="contains harmful instructions, for safety research only",
)
