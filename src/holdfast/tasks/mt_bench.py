"""MT-Bench: 80 questions in two turns, each answer rated from 1 to 10 by a judge (Zheng et al. 2023).

Columns: `turns` (two texts), `category`, `question_id` and for some a `reference`, as in FastChat's
`question.jsonl`; or `prompt` (two texts), `category`, `reference`, as in the Hub's copy. A row's `turns` are
the user's two messages; the second is asked after the answer to the first. The score is the mean over both
turns of all questions.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task


def to_row(record: Record) -> Row:
    """Return a row with the first turn as instruction, both as `turns`, and the judge's `reference`."""
    turns = record["turns"] if "turns" in record else record["prompt"]
    texts = isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns)
    if not texts or len(turns) not in (1, 2):
        raise ValueError(f"`{'turns' if 'turns' in record else 'prompt'}` is {turns!r}; expected two texts")
    reference = record.get("reference") or []
    row = {"instruction": turns[0], "input": "", "output": "", "turns": list(turns)}
    return {**row, "reference": list(reference), "category": [record["category"]]}


TASK = Task(
    name="mt_bench",
    summary="80 open questions in two turns, rated by a judge",
    metric="mt_bench",
    to_row=to_row,
    columns=(("turns", "category"), ("prompt", "category", "reference")),
    hub_id="HuggingFaceH4/mt_bench_prompts",
    splits={"test": "train"},
    licence="Apache-2.0",
    prompts_only=True,
    max_new_tokens=1024,
    test_size=80,
)
