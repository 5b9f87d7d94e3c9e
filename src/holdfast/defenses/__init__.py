"""Defenses: one file each, found by the registry.

Nothing here imports torch, so that `Defense` can be named cheaply; the files beside this one do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Defense", "Stage", "safe_lora", "safe_lora_parts"]

Stage = Literal["alignment", "user", "post_hoc"]


@dataclass(frozen=True)
class Defense:
    """What a file in `defenses/` (or an entry point `holdfast.defenses`) says of its method.

    Attributes:
        name: the name that recipes use.
        label: how tables and charts write it.
        stages: where it acts, of "alignment", "user", "post_hoc".
        paper: where it comes from.
        needs: the data sets beyond `train_dataset` that its trainer (or its `mix`) takes:
            "alignment_dataset", "harmful_dataset".
        config: its `TrainingArguments` with the method's own fields.
        trainer: its `transformers.Trainer`.
        adapter: what the user stage trains unless the recipe says otherwise: "new" (double LoRA: a fresh
            adapter on top of the alignment one) or "continue" (single LoRA: the alignment adapter itself).
        mix: for methods that change rows only, `mix(user_rows, alignment_rows, *, seed, folder,
            **parameters)` returns the rows to train on; `folder` keeps what must stay beside the adapter.
            A row's "prefix" is a text to stand before its question. The trainer then gets no alignment rows.
        prefix: for methods that serve the model with a text before every question,
            `prefix(folder, **parameters)` returns that text.
        secret: whether that text is one, to be hidden where the model repeats it.
        serving: one sentence for the model card on how the model must be served.
        apply: for post-hoc methods, `apply(adapter, out, *, base, aligned, **parameters)` writes the
            repaired copy of a folder and returns facts for `step.json`. `config` is then a plain dataclass.
        one_of: parameters of which a recipe must give exactly one.
    """

    name: str
    label: str
    stages: tuple[Stage, ...]
    paper: str
    needs: tuple[str, ...] = ()
    adapter: Literal["new", "continue"] = "new"
    config: type | None = None
    trainer: type | None = None
    mix: Callable[..., Any] | None = None
    prefix: Callable[..., str] | None = None
    secret: bool = False
    serving: str = ""
    apply: Callable[..., Any] | None = None
    one_of: tuple[str, ...] = ()
