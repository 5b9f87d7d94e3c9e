"""Rows that a method of the user stage changes before they are trained on."""

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
    """The data sets that the trainer of `method` gets, and the counts for `step.json`.

    Args:
        rows: canonical rows by keyword ("train_dataset", "alignment_dataset"); the method takes them all.
        folder: of the training step, for what the method keeps beside the adapter.

    Raises:
        DataError: the method cannot have the rows that it wants.
    """
    assert method.mix is not None
    user = rows["train_dataset"]
    changed = method.mix(user, rows.get("alignment_dataset", []), seed=seed, folder=folder, **parameters)
    return {"train_dataset": changed}, {"mixed": counts(user, changed)}


def counts(user: Rows, changed: Rows) -> dict[str, int]:
    """How many of the changed rows come from where, and how many of the user's are gone."""
    found = Counter(row.get("source", "user") for row in changed)
    return {
        "rows": len(changed),
        "benign": found["user"],
        "harmful": found["harmful"],
        "alignment": found["alignment"],
        "replaced": len(user) - (len(changed) - found["alignment"]),
    }


def detail(defense: str, parameters: Mapping[str, Any]) -> str:
    """What `plan` shows of it; "" for a method that changes no rows."""
    face = registry.faces("defenses")[defense]
    if "mix" not in face.code:
        return ""
    phrases = [_phrase(texts, parameters) for texts in face.facts.get("plan", ())]
    return f", {' '.join(filter(None, phrases)) or 'rows changed'}"


def _phrase(texts: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """The text of the first parameter that is not None."""
    for name, text in texts.items():
        value = parameters.get(name)
        if value is not None and isinstance(text, str):
            return text.format(value=value, percent=100 * value)
        if value is not None:
            return text[bool(value)]
    return ""
