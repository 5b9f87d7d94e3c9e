"""Texts about an attacker's sweep: a point, and the line of a row of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.reporting.read import mapping, number

NAMES = {"learning_rate": "learning rate", "steps": "steps", "epochs": "epochs", "rank": "rank"}


def point_text(given: Mapping[str, Any]) -> str:
    """Return a point as text: "500 steps, learning rate 0.001"."""
    parts = []
    for key, name in NAMES.items():
        value = number(given.get(key))
        if value is not None:
            parts.append(f"{value:g} {name}" if key in ("steps", "epochs") else f"{name} {value:g}")
    return ", ".join(parts)


def line_of(raws: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the line of a row of the table about its sweep, over all seeds; None without one."""
    found = [mapping(raw.get("attack_sweep")) for raw in raws]
    if not found[0]:
        return None
    points = ", or ".join(dict.fromkeys(point_text(mapping(one.get("point"))) for one in found))
    count, loss = number(found[0].get("points")) or math.nan, number(found[0].get("max_loss")) or 0.0
    return f"worst of {count:g} attacks with accuracy within {loss:g} points of the best: {points}"
