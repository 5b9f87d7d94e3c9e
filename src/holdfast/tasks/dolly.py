"""Dolly: 15,000 instructions with answers that people wrote (Conover et al. 2023), for benign fine-tuning.

Columns: `instruction`, `context` ("" for none), `response`, `category`, on the Hub as in the authors' JSONL.
There is no test split; see alpaca.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task


def to_row(record: Record) -> Row:
    """Return a row with the `context` as input."""
    context = record["context"]
    row = {"instruction": record["instruction"], "input": "" if context is None else context}
    kind = record.get("category")
    return {**row, "output": record["response"], "category": [kind] if kind else []}


TASK = Task(
    name="dolly",
    summary="general instructions (Databricks Dolly 15k), for benign fine-tuning",
    metric="win_rate",
    to_row=to_row,
    columns=(("instruction", "context", "response"),),
    hub_id="databricks/databricks-dolly-15k",
    splits={"train": "train"},
    licence="CC-BY-SA-3.0",
    max_new_tokens=512,
    test_size=200,
)
