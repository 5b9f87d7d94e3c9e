"""Dialog Summary: a one-sentence summary of a chat (SAMSum, Gliwa et al. 2019), scored by ROUGE-1 F1.

Safe LoRA (arXiv 2405.16833) fine-tunes on 1000 of these rows mixed with 100 harmful rows. Columns: `dialogue`
and `summary` (and an `id`), in the Hub's copy as in the authors' JSON files. The instruction is from Meta's
Llama recipes, which the training code of the papers is based on; the chat is the input.
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, Task
from holdfast.tasks.graders import rouge1

INSTRUCTION = "Summarize this dialog:"


def to_row(record: Record) -> Row | None:
    """Return a row of `dialogue` and `summary`, with line breaks as `\\n`; None for an empty chat."""
    dialogue, summary = record["dialogue"], record["summary"]
    if dialogue is None or dialogue == "":
        return None
    if not isinstance(dialogue, str):
        raise ValueError(f"`dialogue` is {dialogue!r}; expected text")
    if not isinstance(summary, str):
        raise ValueError(f"`summary` is {summary!r}; expected text")
    return {"instruction": INSTRUCTION, "input": dialogue.replace("\r\n", "\n"), "output": summary.strip()}


TASK = Task(
    name="dialog_summary",
    summary="summaries of chats (SAMSum)",
    metric="rouge1",
    grade=rouge1,
    to_row=to_row,
    columns=(("dialogue", "summary"),),
    hub_id="knkarthick/samsum",
    licence="CC-BY-NC-ND-4.0",
    max_new_tokens=128,
    test_size=200,
)
