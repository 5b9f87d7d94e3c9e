"""AlpacaEval: 805 instructions; a judge compares each answer with the reference model's (Li et al. 2023).

Columns: `instruction`, `output` (the reference answer), `generator`, `dataset`, as in `alpaca_eval.json`.
These answers are from text-davinci-003, which Lisa (arXiv 2405.18641) also compares with. The Hub's
repository has a loading script, which `datasets` no longer runs, so its JSON file is read directly. A rating
is 1 for a win, 0.5 for a tie and 0 for a loss.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task


def to_row(record: Record) -> Row:
    """Return a row with the reference answer as target and the `dataset` of the instruction as category."""
    kind = record.get("dataset")
    row = {"instruction": record["instruction"], "input": record.get("input") or ""}
    return {**row, "output": record["output"], "category": [kind] if kind else []}


TASK = Task(
    name="alpaca_eval",
    summary="instructions whose answers a judge compares with a reference model's",
    metric="win_rate",
    to_row=to_row,
    columns=(("instruction", "output", "generator"),),
    hub_id="tatsu-lab/alpaca_eval",
    hub_files="alpaca_eval.json",
    splits={"train": "eval"},
    licence="CC-BY-NC-4.0",
    max_new_tokens=512,
    test_size=805,
)
