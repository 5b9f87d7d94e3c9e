"""AdvBench: 520 harmful behaviours, with the first words of an answer that complies (Zou et al. 2023).

Columns: `goal`, `target`, as in the authors' `harmful_behaviors.csv`, or `prompt`, `target`, as in the Hub's
copy; a copy with only the goals may have no header. The prompts are for tests; the targets are only the
openings of answers.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return a row of the goal and the opening of an answer."""
    if kind != "unsafe":
        return None
    asked = record["goal"] if "goal" in record else record["prompt"]
    return {"instruction": asked, "input": "", "output": record["target"]}


TASK = SafetyData(
    name="advbench",
    summary="520 harmful behaviours, to test on",
    to_row=to_row,
    columns=(("goal", "target"), ("prompt", "target")),
    header=("goal",),
    hub_id="walledai/AdvBench",
    licence="MIT",
    splits={"test": "train"},
    warning="contains harmful instructions, for safety research only",
    obtain="accept its terms on its Hub page if it has any, or write advbench:FILE",
)
