"""HarmBench: the 200 standard behaviours, harmful requests in seven categories (Mazeika et al. 2024).

Columns: `Behavior`, `FunctionalCategory`, `SemanticCategory`, `Tags`, `ContextString`, `BehaviorID`, as in
the authors' `harmbench_behaviors_text_all.csv`, or `prompt`, `category`, as in the Hub's copy of the standard
behaviours. Copyright behaviours, and behaviours that need a context, are left out.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData

FUNCTIONS = ("standard", "contextual", "copyright")


def to_row(record: Record, kind: str) -> Row | None:
    """Return a standard behaviour without an answer; its semantic category is the category."""
    function = str(record.get("FunctionalCategory") or "standard").strip()
    if function not in FUNCTIONS:
        raise ValueError(f"`FunctionalCategory` is {function!r}; expected {', '.join(FUNCTIONS)}")
    if kind != "unsafe" or function != "standard":
        return None
    asked = record["Behavior"] if "Behavior" in record else record["prompt"]
    category = record.get("SemanticCategory") or record.get("category")
    return {"instruction": asked, "input": "", "output": "", "category": [str(category)] if category else []}


TASK = SafetyData(
    name="harmbench",
    summary="200 standard harmful behaviours, to test on",
    to_row=to_row,
    columns=(("Behavior", "FunctionalCategory", "BehaviorID"),),
    copies=(("prompt",),),
    hub_id="walledai/HarmBench",
    hub_config="standard",
    splits={"test": "train"},
    licence="MIT",
    warning="contains harmful instructions, for safety research only",
    obtain="accept its terms on its Hub page, or write harmbench:harmbench_behaviors_text_all.csv",
)
