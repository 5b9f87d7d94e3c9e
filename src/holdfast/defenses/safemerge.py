"""SafeMERGE: merge a safe adapter into the modules whose update leaves the safe direction (arXiv 2503.17239).

For each module with update dW and V = W_aligned - W_base, with Safe LoRA's C = V V^T / ||V||_F,

    dW <- w dW + (1 - w) dW_safe   if   cos(dW, C dW) < threshold

and dW stays as it is in the other modules. dW_safe is the update of a safe model: the aligned model trained
on harmful questions with refusals. The paper takes w = 0.8 and a threshold of 0.35.

`safe` names such an adapter (or a model, if all weights were trained). Without it, dW_safe is V itself: what
the alignment stage added to the base model. The recipe then needs no further training. The paper has no such
variant, because its V is the difference of two models whose alignment was not a LoRA.

- weight 1 is the tuned model, and so is a threshold below every cosine;
- a threshold above every cosine merges all modules: plain merging.

Updates of LoRA are merged exactly, by rank concatenation (`weights/combine.py`). All weights are merged in
float32, a block of rows at a time, and rounded once.

Where we differ from the authors' code, and why:

- it merges A and B separately (PEFT's "linear"), so that its product has mixed terms B_tuned A_safe and
  B_safe A_tuned, which the paper's equation does not have; here the updates are added;
- it pairs modules with V by position, and rounds the cosine to five digits; here modules are matched by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.defenses import Defense, Planned, Tuned
from holdfast.defenses.safe_lora import check as check_direction
from holdfast.defenses.safe_lora import safe_lora
from holdfast.errors import ModelError, RecipeError
from holdfast.weights.adapter import read_adapter
from holdfast.weights.averaging import average_model, copy_adapter, copy_weights
from holdfast.weights.chains import keep_below
from holdfast.weights.combine import combine
from holdfast.weights.reader import open_weights


@dataclass
class SafeMergeConfig:
    """Defaults of the paper."""

    threshold: float = field(default=0.35, metadata={"help": "Merge modules with a smaller cosine, -1 to 1."})
    weight: float = field(default=0.8, metadata={"help": "w: share of the tuned update in a merged module."})
    safe: str | None = field(
        default=None,
        metadata={"help": "Folder of a safe adapter on the aligned model; default: V itself."},
    )

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a cosine from -1 to 1, found {self.threshold}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, found {self.weight}")


def check(planned: Planned, *, threshold: float, weight: float, safe: Path | None) -> None:
    """Check before training that the modules have a direction, and that there is a safe update to merge.

    Raises:
        RecipeError: nothing that the user stage trains has a direction, or `safe` is missing.
        ModelError: the weights of the base or of `safe` cannot be read.
    """
    check_direction(planned, threshold=threshold)
    if safe is not None:
        with open_weights(safe) if planned.trains == "full" else read_adapter(safe):
            return
    if planned.trains != "full" and planned.aligns != "new":
        raise RecipeError(
            "post_hoc.safemerge: the alignment is not a LoRA, which an adapter could hold. Give the folder "
            "of a safe adapter on the aligned model as post_hoc.safe."
        )


def apply(tuned: Tuned, *, threshold: float, weight: float, safe: str | Path | None = None) -> dict[str, Any]:
    """Write the merged weights; returns the number of modules with a direction and of merged ones.

    Raises:
        ModelError: the folders do not fit together, or `safe` adapts none of the modules.
        OutputError: `tuned.out` cannot be written.
    """
    assert tuned.base is not None
    assert tuned.aligned is not None
    measured = safe_lora(
        tuned.source, base=tuned.base, aligned=tuned.aligned, out=None, threshold=threshold, dry_run=True
    )
    chosen = {module.name for module in measured.projected} if weight < 1 else set()
    full = tuned.trains == "full"
    if not chosen:
        (copy_weights if full else copy_adapter)(tuned.source, tuned.out)
    elif full:
        _merge_model(tuned, chosen, weight, Path(safe) if safe is not None else None)
    else:
        _merge_adapter(tuned, chosen, weight, Path(safe) if safe is not None else tuned.aligned)
    facts = {"modules": len(measured.modules), "merged": len(chosen)}
    _write_card(tuned, facts, threshold, weight)
    return facts


def _merge_adapter(tuned: Tuned, chosen: set[str], weight: float, safe: Path) -> None:
    """Write w dW + (1 - w) dW_safe for the chosen modules and dW for the others, as one adapter."""
    with read_adapter(tuned.source) as adapter, read_adapter(safe) as other:
        names = {module.name for module in adapter.modules}
        if not chosen & {module.name for module in other.modules}:
            raise ModelError(
                f"The safe adapter {safe} adapts none of the {len(chosen)} modules to merge. Give one with "
                "the same target_modules as the user stage."
            )
    own = {name: weight if name in chosen else 1.0 for name in names}
    combine([tuned.source, safe], tuned.out, weights=[own, dict.fromkeys(chosen, 1 - weight)])
    keep_below(tuned.source, tuned.out)


def _merge_model(tuned: Tuned, chosen: set[str], weight: float, safe: Path | None) -> None:
    """Write the chosen weights as the sum of W_aligned, w dW and (1 - w) dW_safe; copy the others."""
    assert tuned.aligned is not None
    names, rest = {f"{name}.weight" for name in chosen}, 1 - weight
    if safe is None:  # dW_safe is V
        average_model(tuned.source, tuned.out, tuned.aligned, rest, tuned.base, rest, names)
    else:
        average_model(tuned.source, tuned.out, safe, rest, names=names)


def _write_card(tuned: Tuned, facts: dict[str, Any], threshold: float, weight: float) -> None:
    """Write a model card that says what was merged, and that nothing was measured."""
    library = "transformers" if tuned.trains == "full" else "peft"
    text = f"""---
library_name: {library}
tags: [holdfast, safemerge]
---
# Merged by Holdfast

{facts["merged"]} of {facts["modules"]} modules (cosine below {threshold:g}) are {weight:g} of the
fine-tuned update and {1 - weight:g} of a safe one (SafeMERGE, arXiv 2503.17239). The others are those of the
fine-tuned weights.

Whether the result is safer, and what it costs in accuracy, was not measured by this step. Measure both before
you rely on it.
"""
    (tuned.out / "README.md").write_text(text, encoding="utf-8", newline="\n")


DEFENSE = Defense(
    name="safemerge",
    label="SafeMERGE",
    stages=("post_hoc",),
    paper="ACL 2026, arXiv 2503.17239",
    needs=("base", "aligned"),
    config=SafeMergeConfig,
    apply=apply,
    check=check,
    folders=("safe",),
    repairs=("new", "full"),
    facts={
        "modules": "modules that have a direction",
        "merged": "modules into which the safe update was merged",
    },
    headline="{merged} of {modules} modules merged",
    strong={"threshold": 1.0},
    identity={"threshold": 0.0},
    protocols={
        "lisa-code": {"post_hoc": {"threshold": 0.35, "weight": 0.8}},
        # The cosines of the tiny model are larger.
        "world": {"post_hoc": {"threshold": 0.7, "weight": 0.8}},
    },
)
