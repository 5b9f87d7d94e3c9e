"""Attacks: changes that an attacker makes to the rows before fine-tuning; one file per attack.

This file does not import torch, so that importing `Attack` is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Attack", "anchoring"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Attack:
    """The declaration of an attack, in a file in `attacks/` or an entry point `holdfast.attacks`.

    Every argument is a literal or a name, because the registry reads the file without importing it. An attack
    contains templates and transformations only; the rows are the user's.

    Attributes:
        name: the name that recipes use: `data.attack`.
        label: the name in tables.
        paper: the source of the attack.
        config: a plain dataclass with the attack's own parameters.
        change: `change(rows, *, seed, **parameters)` returns the rows to fine-tune on. A row has `id`,
            `instruction`, `input`, `output`, `source` ("user" or "harmful"), and `messages` if it is a
            conversation; its "prefix" is put before its question. The rows that are given do not change.
        prompt: for an attack that also changes the question at test time, `prompt(row, *, seed,
            **parameters)` returns a test row with the changed question (`evaluation.attacked`).
        training: training arguments of the user stage that the attack sets, each with the name of the
            parameter that holds the value. They replace those of the recipe.
        plan: the text of `holdfast plan`, with the names of parameters in braces.
        version: increase it when the attack makes other rows.
    """

    name: str
    label: str
    paper: str
    config: type | None = None
    change: Callable[..., Sequence[Row]] | None = None
    prompt: Callable[..., Row] | None = None
    training: Mapping[str, str] = field(default_factory=dict)
    plan: str = ""
    version: int = 1
