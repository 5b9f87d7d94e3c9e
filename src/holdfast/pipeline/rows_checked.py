"""Check the rows of a stage before anything is trained: render and tokenise each of them once.

One row is in memory at a time. The rules are those of the training and of the generation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.prompts import render_prompt, training_row
from holdfast.errors import DataError, InputError
from holdfast.machine.progress import Advance
from holdfast.machine.store import canonical_json
from holdfast.training.tokenising import IGNORED, tokenise

SHOWN = 20
"""Number of rows that a message lists; the others are counted."""

REMEMBERED = 100_000
"""Number of rows that checks of several steps remember, so that the runs of a grid check a row once."""

LEARNED = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
"""Last name parts of tables of positions: a longer row cannot be computed."""


class BadRows(DataError):
    """Rows that cannot be used.

    Attributes:
        rows: the reason, by the id of the row.
        of: how many rows were checked.
        what: the rows, as in "user rows".
    """

    def __init__(self, rows: Mapping[str, str], of: int, what: str):
        self.rows, self.of, self.what = rows, of, what
        super().__init__(self.text({}))

    def text(self, places: Mapping[str, str]) -> str:
        """Return the message; `places` holds the file and line of rows by id."""
        lines = [f"{places.get(name, f'row {name}')}: {reason}" for name, reason in self.rows.items()]
        lines.sort(key=_by_number)
        if len(lines) == 1:
            return lines[0]
        more = [f"... and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
        head = f"{len(lines):,} of {self.of:,} {self.what} cannot be used with this model:"
        return "\n  ".join([head, *lines[:SHOWN], *more])


def _by_number(line: str) -> list[tuple[int, str]]:
    """A sort key that puts line 2 before line 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d{1,9})", line)]


@dataclass(frozen=True)
class Limits:
    """The limits of a model: entries in its table of tokens, and in its table of positions if it has one."""

    tokens: int
    positions: int | None


def limits(model: Any) -> Limits:
    """Return the limits of a model, whose tensors may be on "meta"."""
    learned = any(name.rpartition(".")[2] in LEARNED for name, _ in model.named_modules())
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) if learned else None
    return Limits(int(model.get_input_embeddings().weight.shape[0]), positions)


def read_one_by_one(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of ours."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def count_rows(path: Path) -> int:
    """Count the rows of a file of ours."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def check_training_rows(
    rows: Iterable[Mapping[str, Any]],
    of: int,
    what: str,
    *,
    tokenizer: Any,
    template: str,
    max_length: int,
    model: Limits,
    progress: Advance,
    known: set[int] | None = None,
) -> int:
    """Render and tokenise rows to train on; returns how many are longer than `max_length` and are cut.

    Args:
        of: the number of rows.
        template: "chat" or "alpaca".
        known: hashes of rows that a check with the same arguments found to be good; this check adds its own.

    Raises:
        BadRows: the template refuses rows, their prompt alone has max_length tokens, or the model has no
            such tokens or positions.
    """
    bad: dict[str, str] = {}
    cut = 0
    good = set() if known is None else known
    for done, row in enumerate(rows, 1):
        same = hash(canonical_json(row))
        if same in good:
            progress(done, of)
            continue
        try:
            made = tokenise(training_row(row, tokenizer, template, row.get("prefix", "")), tokenizer, None)
        except InputError as error:
            bad[row["id"]] = reason(error, row["id"])
            continue
        ids = made["input_ids"]
        before = next(i for i, label in enumerate(made["labels"]) if i and label != IGNORED)
        cut += len(ids) > max_length
        if before >= max_length:
            bad[row["id"]] = (
                f"the prompt alone has {before:,} tokens, so that max_length ({max_length:,}) leaves no "
                "answer to learn. Raise training.max_length, or drop the row"
            )
        elif found := beyond(ids[:max_length], model, min(len(ids), max_length)):
            bad[row["id"]] = found
        elif len(ids) <= max_length and len(good) < REMEMBERED:
            good.add(same)
        progress(done, of)
    if bad:
        raise BadRows(bad, of, what)
    return cut


def check_prompts(
    rows: Iterable[Mapping[str, Any]],
    of: int,
    *,
    tokenizer: Any,
    template: str,
    system: str,
    model: Limits,
    progress: Advance,
) -> None:
    """Render and tokenise the prompts to answer.

    Raises:
        BadRows: the template refuses rows, or the model has no such tokens or positions.
    """
    bad: dict[str, str] = {}
    for done, row in enumerate(rows, 1):
        try:
            before = "\n\n".join(text for text in (system, row.get("prefix", "")) if text)
            prompt = render_prompt(row, tokenizer, template, before)
        except InputError as error:
            bad[row["id"]] = reason(error, row["id"])
            continue
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if found := beyond(ids, model, len(ids) + 1):
            bad[row["id"]] = found
        progress(done, of)
    if bad:
        raise BadRows(bad, of, "test rows")


def beyond(ids: list[int], model: Limits, length: int) -> str | None:
    """Return why the model cannot compute these tokens; None if it can."""
    if model.positions is not None and length > model.positions:
        return (
            f"it has {length:,} tokens, and the model has only {model.positions:,} positions. Lower "
            "training.max_length, or drop the row"
        )
    if ids and max(ids) >= model.tokens:
        return (
            f"token {max(ids)} of the tokenizer is not in the model, which knows {model.tokens:,} tokens. "
            "The tokenizer belongs to another model, or tokens were added to it alone"
        )
    return None


def reason(error: InputError, name: str) -> str:
    """Return an error without the row that it names, and without its final full stop."""
    text = str(error).removeprefix(f"Row {name}: ").removeprefix("Row 0: ")
    return text.rstrip(".")
