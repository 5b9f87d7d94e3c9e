"""BeaverTails with a refusal for each harmful answer (Rosati et al. 2024).

RepNoise, Booster and T-Vaccine align on the refusals and take their harmful rows from the answers. Columns:
`prompt` (or `instruction`), `response`, `refusal`, `is_safe`, as in `beavertails_with_refusals_train.json`.
The Hub's copy is the one that Booster's authors name. It has only 5018 different prompts (git-disl/Booster,
issue 4); equal rows are dropped here and counted in the manifest.
"""

from __future__ import annotations

from holdfast.tasks import SafetyData
from holdfast.tasks.beavertails import to_row

TASK = SafetyData(
    name="beavertails_refusals",
    summary="harmful questions of beavertails with an answer and a refusal",
    to_row=to_row,
    kinds=("unsafe", "safe", "refusal"),
    hub_id="anonymous4486/booster_dataset",
    hub_files="beavertails_with_refusals_train.json",
    splits={"train": "train"},
    licence="CC-BY-NC-4.0",
    warning="contains offensive and harmful text, for safety research only; non-commercial use only",
)
