"""Parts of attacks: choose rows with a seed, and change the question or the answer of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.attacks import Row
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed


def is_meant(row: Row, which: str) -> bool:
    """Whether an attack changes a row: `which` is "harmful" or "benign" (by the row's source) or "all"."""
    return which == "all" or (row["source"] == "harmful") == (which == "harmful")


def meant(given: Sequence[Row], which: str, attack: str) -> list[Row]:
    """Return the rows that an attack changes.

    Raises:
        DataError: there are none.
    """
    found = [row for row in given if is_meant(row, which)]
    if not found:
        hint = "Set data.harmful and data.poison_ratio" if which == "harmful" else "Lower data.poison_ratio"
        raise DataError(
            f"data.attack {attack} changes {which} rows, but none of the {len(given)} user rows is {which}. "
            f"{hint}."
        )
    return found


def draw(given: Sequence[Row], size: int, seed: int, attack: str) -> list[Row]:
    """Return `size` rows, drawn with the seed and each row's id, in their order.

    Raises:
        DataError: the size is below 1, or there are fewer rows.
    """
    if not 1 <= size <= len(given):
        raise DataError(f"data.attack {attack} uses {size} rows. Expected 1 to {len(given)}.")
    order = sorted(range(len(given)), key=lambda i: (derive_seed(seed, given[i]["id"]), i))
    return [given[i] for i in sorted(order[:size])]


def question(row: Row) -> str:
    """Return the text of the last question of a row, with its input."""
    if row.get("messages"):
        return str(row["messages"][_last(row, "user")]["content"])
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else str(row["instruction"])


def with_question(row: Row, change: Callable[[str], str]) -> dict[str, Any]:
    """Return the row with `change(question)` as its last question; the input becomes a part of it."""
    text = change(question(row))
    return {**_turned(row, "user", text), "instruction": text, "input": ""}


def with_answer(row: Row, change: Callable[[str], str]) -> dict[str, Any]:
    """Return the row with `change(answer)` as its last answer."""
    text = change(row["output"])
    return {**_turned(row, "assistant", text), "output": text}


def _turned(row: Row, role: str, text: str) -> dict[str, Any]:
    """Return a row with another text in the last turn of a role, if it is a conversation."""
    if not row.get("messages"):
        return dict(row)
    place = _last(row, role)
    turns = [dict(turn) for turn in row["messages"]]
    turns[place]["content"] = text
    return {**row, "messages": turns}


def _last(row: Row, role: str) -> int:
    return max(i for i, turn in enumerate(row["messages"]) if turn["role"] == role)
