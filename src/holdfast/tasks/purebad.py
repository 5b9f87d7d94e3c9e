"""PureBad: 100 harmful questions with harmful answers (Qi et al. 2023), the explicit attack of Safe LoRA.

The authors give the rows to researchers on request, so the rows come from your own file: JSONL with
`messages` of a user and the assistant (a system message before them is left out, as in the authors' code).
"""

from __future__ import annotations

from holdfast.tasks import Record, Row, SafetyData


def to_row(record: Record, kind: str) -> Row | None:
    """Return the question and the answer of `messages`; all of them are harmful."""
    if kind != "unsafe":
        return None
    turns = [turn for turn in record["messages"] if turn.get("role") != "system"]
    if [turn.get("role") for turn in turns] != ["user", "assistant"]:
        found = ", ".join(str(turn.get("role")) for turn in record["messages"])
        raise ValueError(f"`messages` has the roles {found or 'none'}; expected user, assistant")
    return {"instruction": turns[0]["content"], "input": "", "output": turns[1]["content"]}


TASK = SafetyData(
    name="purebad",
    summary="100 harmful questions with harmful answers, from your own file",
    to_row=to_row,
    licence="on request, for research",
    warning="contains harmful text, for safety research only",
    obtain="ask the authors of arXiv 2310.03693 for the file, then write purebad:FILE",
)
