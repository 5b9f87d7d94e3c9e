"""Attacks: what an attacker does to the rows before fine-tuning, or to the weights after it; one file each.

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
        apply: for an attack on weights, `apply(model, out, *, harmful, harmless, device, max_length, options,
            **parameters)` writes a changed copy of the model folder `model` to `out` and returns facts.
            `harmful` and `harmless` are rows with `prompt`; `options` are the options of `load_model`. Its
            parameters may not have these names.
        check: for an attack on weights, `check(model, **parameters)` raises before anything is trained if
            the attack is not possible on that model.
        headline: the text of tables about an attack on weights, with the names of facts in braces.
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
    apply: Callable[..., Mapping[str, Any]] | None = None
    check: Callable[..., None] | None = None
    headline: str = ""
    training: Mapping[str, str] = field(default_factory=dict)
    plan: str = ""
    version: int = 1
