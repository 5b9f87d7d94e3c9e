"""Rows that a method of the user stage changes before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.defenses import Defense

Rows = Sequence[Mapping[str, Any]]


def mix(
    method: Defense, rows: Mapping[str, Rows], parameters: Mapping[str, Any], seed: int, folder: Path
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Return the data sets for the trainer of `method`, and the counts for `step.json`.

    Args:
        rows: canonical rows by keyword ("train_dataset", "alignment_dataset"); the method takes them all.
        folder: the folder of the training step, in which the method can keep files beside the adapter.

    Raises:
        DataError: the rows that the method needs do not exist.
    """
    assert method.mix is not None
    user = rows["train_dataset"]
    changed = method.mix(user, rows.get("alignment_dataset", []), seed=seed, folder=folder, **parameters)
    return {"train_dataset": changed}, {"mixed": counts(user, changed)}


def counts(user: Rows, changed: Rows) -> dict[str, int]:
    """Count the changed rows by origin, and the user's rows that were replaced."""
    found = Counter(row.get("source", "user") for row in changed)
    return {
        "rows": len(changed),
        "benign": found["user"],
        "harmful": found["harmful"],
        "alignment": found["alignment"],
        "replaced": len(user) - (len(changed) - found["alignment"]),
    }


def detail(defense: str, parameters: Mapping[str, Any]) -> str:
    """Return the text that `plan` shows for the change; "" for a method that changes no rows."""
    face = registry.face("defenses", defense)
    if "mix" not in face.code:
        return ""
    phrases = [_phrase(texts, parameters) for texts in face.facts.get("plan", ())]
    return f", {' '.join(filter(None, phrases)) or 'rows changed'}"


def _phrase(texts: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Return the text of the first parameter that is not None."""
    for name, text in texts.items():
        value = parameters.get(name)
        if value is not None and isinstance(text, str):
            return text.format(value=value, percent=100 * value)
        if value is not None:
            return text[bool(value)]
    return ""
