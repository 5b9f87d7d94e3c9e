"""BeaverTails, the large version: about 330,000 questions and answers (Ji et al. 2023)."""

from __future__ import annotations

from holdfast.tasks import SafetyData
from holdfast.tasks.beavertails import to_row

TASK = SafetyData(
    name="beavertails_330k",
    summary="the 330k version of beavertails",
    to_row=to_row,
    kinds=("unsafe", "safe"),
    hub_id="PKU-Alignment/BeaverTails",
    splits={"train": "330k_train", "test": "330k_test"},
    licence="CC-BY-NC-4.0",
    warning="contains offensive and harmful text, for safety research only; non-commercial use only",
)
