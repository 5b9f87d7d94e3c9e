"""Alpaca: 52,000 instructions with answers (Taori et al. 2023), for benign fine-tuning.

Qi et al. (arXiv 2310.03693) and Safe LoRA fine-tune on it. Columns: `instruction`, `input`, `output` (the
Hub's copy also has `text`), as in `alpaca_data.json`. A few records of the published file have no answer;
they are left out. There is no test split, so rows are held out and a judge compares the model's answers with
the answers of these rows. The papers measure the utility of these models on MT-Bench (`test: mt_bench`).
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task


def to_row(record: Record) -> Row | None:
    """Return the record as it is; None if its answer is blank."""
    if isinstance(record["output"], str) and not record["output"].strip():
        return None
    found = record.get("input")
    given = "" if found is None else found
    return {"instruction": record["instruction"], "input": given, "output": record["output"]}


TASK = Task(
    name="alpaca",
    summary="general instructions (Stanford Alpaca), for benign fine-tuning",
    metric="win_rate",
    to_row=to_row,
    columns=(("instruction", "output"),),
    hub_id="tatsu-lab/alpaca",
    splits={"train": "train"},
    licence="CC-BY-NC-4.0",
    max_new_tokens=512,
    test_size=200,
)
