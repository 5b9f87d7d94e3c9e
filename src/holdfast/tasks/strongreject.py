"""StrongREJECT: 313 forbidden questions in six categories (Souly et al. 2024), to test on.

Columns: `category`, `source`, `forbidden_prompt`, as in the authors' `strongreject_dataset.csv` and
`strongreject_small_dataset.csv`, or `prompt`, `category`, as in the Hub's copy.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return a question without an answer."""
    if kind != "unsafe":
        return None
    asked = record["forbidden_prompt"] if "forbidden_prompt" in record else record["prompt"]
    category = record.get("category")
    return {"instruction": asked, "input": "", "output": "", "category": [str(category)] if category else []}


TASK = SafetyData(
    name="strongreject",
    summary="313 forbidden questions in six categories, to test on",
    to_row=to_row,
    columns=(("forbidden_prompt",),),
    copies=(("prompt",),),
    hub_id="walledai/StrongREJECT",
    splits={"test": "train"},
    licence="MIT",
    warning="contains harmful instructions, for safety research only",
    obtain="accept its terms on its Hub page, or write strongreject:strongreject_dataset.csv",
)
