"""WildGuardTest: 1,725 prompts, harmful and harmless, plain and adversarial (Han et al. 2024), to test on.

Columns: `prompt`, `adversarial`, `prompt_harm_label`, `subcategory` and others about a response, which is not
used. `prompt_harm_label` is "harmful" or "unharmful"; rows without it are left out. As `data.test_harmful` it
gives the harmful prompts, as `data.benign` the others (over-refusal). Gated on the Hub.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData

SIDES = {"harmful": "unsafe", "unharmful": "benign"}


def to_row(record: Record, kind: str) -> Row | None:
    """Return the prompt without an answer if its label is of this kind."""
    label = record["prompt_harm_label"]
    if label not in (None, "", *SIDES):
        raise ValueError(f"`prompt_harm_label` is {label!r}; expected harmful, unharmful or nothing")
    if SIDES.get(label or "") != kind:
        return None
    category = record.get("subcategory")
    named = [str(category)] if category else []
    return {"instruction": record["prompt"], "input": "", "output": "", "category": named}


TASK = SafetyData(
    name="wildguardtest",
    summary="1,725 prompts, harmful and harmless, plain and adversarial",
    to_row=to_row,
    kinds=("unsafe", "benign"),
    columns=(("prompt", "prompt_harm_label"),),
    hub_id="allenai/wildguardmix",
    hub_config="wildguardtest",
    splits={"test": "test"},
    licence="ODC-BY, gated",
    warning="contains harmful instructions, for safety research only",
    obtain="accept its terms on its Hub page, or write wildguardtest:wildguard_test.parquet",
)
