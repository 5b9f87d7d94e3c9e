"""Talks of two turns (MT-Bench): the second question follows the model's own first answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from holdfast.errors import RecipeError
from holdfast.machine.progress import Advance, nobody

SECOND = "second_turn"
"""The set of rows with second turns. No score counts them; a rater reads them with the first turn."""

Rows = list[dict[str, Any]]


def in_turns(
    rows: Sequence[Mapping[str, Any]],
    ask: Callable[[Sequence[Mapping[str, Any]], Advance], Rows],
    progress: Advance = nobody,
) -> Rows:
    """Ask all rows, then the second turns of rows that have one; return all answered rows.

    Args:
        ask: answers rows and returns every row answered so far, in this call and before; called twice if
            there are second turns. It skips answered rows, so that an interrupted run can continue.
    """
    total = len(rows) + sum(has_second(row) for row in rows)
    answered = ask(rows, lambda done, _: progress(done, total))
    second = second_turns(answered)
    return ask(second, lambda done, _: progress(done, total)) if second else answered


def has_second(row: Mapping[str, Any]) -> bool:
    """Whether a row is the first of two turns."""
    return row.get("set") == "task" and len(row.get("turns") or ()) > 1


def second_turns(answered: Iterable[Mapping[str, Any]]) -> Rows:
    """Return the second turns of answered rows, as rows with the talk so far; none after a failed answer."""
    return [
        {
            "id": f"{row['id']}-2",
            "set": SECOND,
            "first": row["id"],
            "instruction": row["turns"][1],
            "input": "",
            "target": None,
            "category": row.get("category", []),
            "messages": [
                {"role": "user", "content": row["turns"][0]},
                {"role": "assistant", "content": row["answer"]},
                {"role": "user", "content": row["turns"][1]},
                {"role": "assistant", "content": ""},
            ],
        }
        for row in answered
        if has_second(row) and "error" not in row
    ]


def complete(rows: Sequence[Mapping[str, Any]], answered: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rows and their second turns are answered."""
    known = {row["id"] for row in answered}
    wanted = {row["id"] for row in rows}
    return wanted <= known and {row["id"] for row in second_turns(answered)} <= known


def check_template(rows: Iterable[Mapping[str, Any]], template: str) -> None:
    """Raise RecipeError if second turns need the Alpaca prompt, which has only one turn.

    On a server, "auto" is the server's own chat template.
    """
    if template.startswith("alpaca") and any(has_second(row) for row in rows):
        raise RecipeError(
            "Questions in two turns (MT-Bench) need a chat template; the Alpaca prompt has one question and "
            "one answer. Use a model whose tokenizer has a chat template, or another task."
        )
