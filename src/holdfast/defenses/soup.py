"""Soup: weight averaging with the aligned model, and a safety vector on top (task arithmetic, RESTA).

With the weights W_tuned after fine-tuning, W_aligned before it and W_base before alignment,

    W = lambda W_aligned + (1 - lambda) W_tuned + gamma (W_aligned - W_base)

- `lambda_` is the share of the aligned model: 0 gives the tuned model, 1 the aligned one. With gamma 0 this
  is the average of a model soup (Wortsman et al., arXiv 2203.05482), the interpolation of WiSE-FT (arXiv
  2109.01903, alpha = 1 - lambda), and task arithmetic with the task vector W_tuned - W_aligned scaled by
  1 - lambda (Ilharco et al., arXiv 2212.04089).
- `gamma` adds a safety vector. With lambda 0 and gamma 1 this is RESTA (Bhardwaj et al., ACL 2024, arXiv
  2402.11746) with coefficient 1.

For LoRA, no dense matrix is built. A user adapter on top of the alignment's is scaled, and a safety vector is
appended to its rank; a single adapter that continued the alignment's is concatenated with it. Both are exact
up to float32 rounding (`weights/combine.py`). All weights are averaged in float32, a block of rows at a time,
and rounded once to the dtype of the tuned model.

Where we differ from RESTA's authors, and why: their safety vector is the aligned model minus a model that was
fine-tuned on harmful rows; here it is the aligned model minus the model before alignment, which needs no
harmful training. Their DARE variant, which drops a random share of the update, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from holdfast.defenses import Defense, Planned, Tuned
from holdfast.errors import RecipeError
from holdfast.weights.averaging import average_model, copy_adapter, copy_weights
from holdfast.weights.chains import keep_below
from holdfast.weights.combine import combine


@dataclass
class SoupConfig:
    """The two coefficients. The default is the plain average of the tuned and the aligned model."""

    lambda_: float = field(
        default=0.5, metadata={"help": "Share of the aligned model, from 0 (the tuned model) to 1."}
    )
    gamma: float = field(
        default=0.0, metadata={"help": "Factor of the safety vector, which is aligned minus base."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_ <= 1:
            raise ValueError(f"lambda_ must be from 0 to 1, found {self.lambda_}")
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be a finite number, found {self.gamma}")


def check(planned: Planned, *, lambda_: float, gamma: float) -> None:
    """Check before training that a safety vector can be computed and added.

    Raises:
        RecipeError: `gamma` is set, but there is no model before alignment, or its difference from the
            aligned model is not a LoRA, so that an adapter cannot hold it.
    """
    if gamma and planned.base is None:
        raise RecipeError(
            "post_hoc.soup: gamma adds the aligned model minus the model before alignment, but alignment is "
            "none. Add an alignment stage, or give the model before alignment as post_hoc.base."
        )
    if gamma and planned.trains != "full" and planned.aligns != "new":
        raise RecipeError(
            "post_hoc.soup: the user stage trains an adapter, but the alignment changed all weights, which "
            "an adapter cannot hold. Leave gamma out, or train all weights with user.lora: none."
        )


def apply(tuned: Tuned, *, lambda_: float, gamma: float) -> dict[str, Any]:
    """Write the average; returns the number of weights and how many of them were changed.

    Raises:
        ModelError: the folders do not fit together, or contain something that cannot be averaged.
        OutputError: `tuned.out` cannot be written.
    """
    if tuned.trains == "full":
        return _average_model(tuned, lambda_, gamma)
    return _average_adapter(tuned, lambda_, gamma)


def _average_adapter(tuned: Tuned, lambda_: float, gamma: float) -> dict[str, Any]:
    """Average a user adapter that is on top of the alignment's ("new") or replaces it ("continue")."""
    if lambda_ == gamma == 0:
        count = copy_adapter(tuned.source, tuned.out)
        _write_card(tuned, "peft", 0.0, 0.0)
        return {"weights": count, "changed": 0}
    parts = [(tuned.source, 1 - lambda_)]
    of_alignment = gamma if tuned.trains == "new" else lambda_ + gamma
    if of_alignment:
        assert tuned.aligned is not None
        parts.append((tuned.aligned, of_alignment))
    made = combine([path for path, _ in parts], tuned.out, weights=[weight for _, weight in parts])
    keep_below(tuned.source, tuned.out)  # the average is used on top of the same adapters
    _write_card(tuned, "peft", lambda_, gamma)
    return {"weights": made.modules, "changed": made.modules}


def _average_model(tuned: Tuned, lambda_: float, gamma: float) -> dict[str, Any]:
    """Average all weights, in the same files as the tuned model."""
    if lambda_ == gamma == 0:
        count = copy_weights(tuned.source, tuned.out)
        _write_card(tuned, "transformers", 0.0, 0.0)
        return {"weights": count, "changed": 0}
    assert tuned.aligned is not None
    base = (tuned.base or tuned.aligned) if gamma else None
    count, changed = average_model(tuned.source, tuned.out, tuned.aligned, lambda_, base, gamma)
    _write_card(tuned, "transformers", lambda_, gamma)
    return {"weights": count, "changed": changed}


def _write_card(tuned: Tuned, library: str, lambda_: float, gamma: float) -> None:
    """Write a model card that says what was averaged, and that nothing was measured."""
    vector = f", plus {gamma:g} times the aligned model minus the base model" if gamma else ""
    text = f"""---
library_name: {library}
tags: [holdfast, soup]
---
# Averaged by Holdfast

{lambda_:g} of the aligned model and {1 - lambda_:g} of the fine-tuned one{vector} (see arXiv 2402.11746 and
2203.05482).

Whether the result is safer, and what it costs in accuracy, was not measured by this step. Measure both before
you rely on it.
"""
    (tuned.out / "README.md").write_text(text, encoding="utf-8", newline="\n")


DEFENSE = Defense(
    name="soup",
    label="Soup",
    stages=("post_hoc",),
    paper="RESTA, arXiv 2402.11746; model soups, arXiv 2203.05482",
    needs=("aligned",),
    optional=("base",),
    config=SoupConfig,
    apply=apply,
    check=check,
    facts={
        "weights": "weight matrices of the adapter's modules, or tensors of the model",
        "changed": "weights that were averaged",
    },
    headline="{changed} of {weights} weights averaged",
    strong={"lambda_": 0.5, "gamma": 1.0},
    identity={"lambda_": 0.0},
    protocols={"lisa-code": {"post_hoc": {"lambda_": [0.25, 0.5, 0.75]}}},
)
