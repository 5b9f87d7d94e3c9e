"""Reinforce: merge a refusal adapter into the user's, outside its directions (arXiv 2605.24550).

The second half of Buffer-and-Reinforce. With a refusal adapter and the user's adapter on one aligned model
W_0, and Q an orthonormal basis of the columns of the user's B,

    W = W_0 + w dW_user + (1 - w) (I - alpha Q Q^T) dW_refusal

Only the B of the refusal adapter changes, and the result is one adapter whose rank is the sum of both ranks
(`holdfast combine --orthogonal`). alpha 0 is plain merging; weight 1 is the user's adapter. The paper takes w
= 0.5, and its code alpha 0.1 for Llama-3-8B, 1 for Gemma and 0 for Qwen.

The refusal adapter is trained on alignment rows on top of a frozen jailbreak adapter (`buffer.py`), so that
it learns to refuse in a model that does not, and is then used without that one. A run trains both as steps of
their own, with the LoRA and training arguments of the user stage.

The paper's text was not read in whole; settings come from the authors' code. Where we differ from it, and
why:

- it takes Q from B V, with V the eigenvectors of A A^T above 1 % of the largest; here Q spans all of B, as in
  notes on the paper, but not directions of a B of lower rank;
- it adds dense matrices in float16 to a whole model; here the sum is an adapter in float32;
- half of its rows for the refusal adapter are harmless ones (Alpaca) with their answers; here they are the
  alignment rows as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.defenses import Defense, Tuned
from holdfast.weights.averaging import copy_adapter
from holdfast.weights.combine import combine


@dataclass
class ReinforceConfig:
    """Defaults of the authors' code for Llama-3-8B."""

    weight: float = field(default=0.5, metadata={"help": "w: share of the user's update; 1 changes nothing."})
    alpha: float = field(
        default=0.1, metadata={"help": "Share of the user's directions taken out of the refusal update."}
    )

    def __post_init__(self) -> None:
        for name in ("weight", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, found {getattr(self, name)}")


def apply(tuned: Tuned, *, weight: float, alpha: float) -> dict[str, Any]:
    """Write the merged adapter; returns the number of modules, of changed ones, and the overlap.

    Raises:
        ModelError: the adapters do not fit together.
        OutputError: `tuned.out` cannot be written.
    """
    assert tuned.refusal is not None
    facts: dict[str, Any]
    if weight == 1:
        facts = {"modules": copy_adapter(tuned.source, tuned.out), "changed": 0, "overlap": None}
    else:
        parts = [tuned.source, tuned.refusal]
        made = combine(parts, tuned.out, weights=[weight, 1 - weight], orthogonal=alpha)
        facts = {"modules": made.modules, "changed": made.modules, "overlap": made.overlap}
    _write_card(tuned, weight, alpha)
    return facts


def _write_card(tuned: Tuned, weight: float, alpha: float) -> None:
    """Write a model card that says what was merged, and that nothing was measured."""
    text = f"""---
library_name: peft
tags: [holdfast, reinforce]
---
# Merged by Holdfast

{weight:g} of the fine-tuned update and {1 - weight:g} of a refusal update, from which {alpha:g} of the output
directions of the first was taken out (Reinforce, arXiv 2605.24550).

Whether the result is safer, and what it costs in accuracy, was not measured by this step. Measure both before
you rely on it.
"""
    (tuned.out / "README.md").write_text(text, encoding="utf-8", newline="\n")


DEFENSE = Defense(
    name="reinforce",
    label="Reinforce",
    stages=("post_hoc",),
    paper="ICML 2026, arXiv 2605.24550",
    needs=("refusal_adapter",),
    config=ReinforceConfig,
    apply=apply,
    repairs=("new",),
    facts={
        "modules": "adapted modules of the result",
        "changed": "modules into which the refusal update was merged",
        "overlap": "mean share of the refusal update that lay in the user's directions",
    },
    headline="{changed} of {modules} modules merged",
    strong={"weight": 0.5, "alpha": 1.0},
    identity={"weight": 1.0},
    protocols={
        "lisa-code": {
            "data": {"alignment": {"harmful": {"size": 5000}}},
            "user": {"defense": "buffer"},
            "post_hoc": {"weight": 0.5, "alpha": 0.1},
        },
        "buffer": {
            "data": {"alignment": {"harmful": {"size": 5000}}},
            "user": {"defense": "buffer"},
            "post_hoc": {"weight": 0.5, "alpha": 0.1},
        },
    },
)
