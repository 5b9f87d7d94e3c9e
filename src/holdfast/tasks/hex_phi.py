"""HEx-PHI: harmful instructions in 11 categories that model providers forbid (Qi et al. 2023), to test on.

Published as `category_1.csv` to `category_11.csv` (without 2, which was removed), 30 prompts each, one per
line and no header. Copies in one CSV, and CSV or JSONL with `prompt` or `instruction` (and `category`), can
be read too. Gated on the Hub: the authors grant access to each person.
"""

from __future__ import annotations

import re

from holdfast.tasks import Record, Row, SafetyData

CATEGORIES = {
    "1": "illegal activity", "2": "child abuse content", "3": "hate, harassment, violence", "4": "malware",
    "5": "physical harm", "6": "economic harm", "7": "fraud, deception", "8": "adult content",
    "9": "political campaigning", "10": "privacy violation activity", "11": "tailored financial advice",
}  # fmt: skip


def to_row(record: Record, kind: str) -> Row | None:
    """Return a prompt without an answer; its category is in a column, or in the number of its file's name."""
    if kind != "unsafe":
        return None
    asked = record["prompt"] if "prompt" in record else record["instruction"]
    number = re.search(r"category_(\d+)", str(record.get("file", "")))
    named = record.get("category") or (CATEGORIES.get(number[1]) if number else None)
    return {"instruction": asked, "input": "", "output": "", "category": [str(named)] if named else []}


TASK = SafetyData(
    name="hex_phi",
    summary="harmful instructions in 11 forbidden categories, to test on",
    to_row=to_row,
    header=("prompt",),
    hub_id="LLM-Tuning-Safety/HEx-PHI",
    hub_files="category_*.csv",
    splits={"test": "train"},
    licence="HEx-PHI licence agreement, gated",
    warning="contains harmful instructions, for safety research only",
    obtain="ask for access on its Hub page, or write hex_phi:FILE with your own copy",
)
