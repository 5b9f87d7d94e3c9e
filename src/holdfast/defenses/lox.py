"""LoX: extrapolate the first directions of the alignment's update before the user stage (arXiv 2506.15606).

For each linear weight, with D = W_aligned - W_base and U_k its first k left singular vectors,

    W = W_aligned + alpha U_k U_k^T D

The alignment stage is plain SFT; LoX changes its result, and the user stage starts from that. The paper takes
k = 6 and alpha = 1.25.

For an alignment with LoRA, D = s B A. U_k comes from a QR decomposition of B and of A^T and an SVD of their r
x r product, and only B changes: B' = B + alpha U_k (U_k^T B). The result is an adapter of the same rank.

All weights are read one matrix at a time. A matrix whose shorter side is at most 1024 has a dense SVD. For
larger ones, U_k comes from subspace iteration with 10 more vectors than k, until every direction u with value
v has ||D D^T u - v u|| <= 1e-4 times the largest v (the fact `error`); without that after 200 rounds, from a
dense SVD.

alpha 0 changes nothing. k >= the rank of D multiplies D by 1 + alpha.

Where we differ from the authors' code: it also changes embeddings and the output head; here these stay, as in
Safe LoRA. The equation and the settings come from the code; the paper's text was not read.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.defenses import Defense, Planned, Tuned
from holdfast.defenses.safe_lora_parts.updates import open_sources, refuse_fused_experts
from holdfast.errors import ModelError
from holdfast.weights.adapter import read_adapter
from holdfast.weights.card import name_base
from holdfast.weights.floats import are_finite, from_float32
from holdfast.weights.folders import holds_adapter
from holdfast.weights.reader import Tensor, WeightFile, open_weights
from holdfast.weights.writer import copy_beside, new_folder, overwrite

Matrix = NDArray[Any]
DENSE = 1024
"""The longest shorter side of a matrix that has a dense SVD."""
TOLERANCE = 1e-4
"""Largest error of a direction of subspace iteration, as a share of the largest squared singular value."""
ROUNDS = 200


@dataclass
class LoxConfig:
    """Defaults of the paper."""

    k: int = field(default=6, metadata={"help": "Number of directions that are extrapolated."})
    alpha: float = field(default=1.25, metadata={"help": "How far; 0 changes nothing."})

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, found {self.k}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a finite number, 0 or more, found {self.alpha}")


@dataclass(frozen=True)
class Directions:
    """The first left singular vectors of a matrix.

    Attributes:
        vectors: U_k, out x k or fewer: directions of singular value 0 are left out.
        energy: their share of ||D||_F squared; 0 if D is zero.
        error: see TOLERANCE; 0 for a dense SVD.
    """

    vectors: Matrix
    energy: float
    error: float = 0.0


def of_matrix(d: Matrix, k: int) -> Directions:
    """Return the first k left singular vectors of a matrix."""
    whole = float(np.vdot(d, d))
    if not whole:
        return Directions(d[:, :0], 0.0)
    found = _iterated(d, k) if min(d.shape) > DENSE else None
    if found is None:
        vectors, values, _ = np.linalg.svd(d, full_matrices=False)
        found = _first(vectors, values, k), 0.0
    vectors, error = found
    return Directions(vectors, float(np.sum(np.square(vectors.T @ d))) / whole, error)


def of_product(b: Matrix, a: Matrix, k: int) -> Directions:
    """Return the first k left singular vectors of B A, without building it."""
    left, upper = np.linalg.qr(b.astype(np.float64))
    vectors, values, _ = np.linalg.svd(upper @ np.linalg.qr(a.astype(np.float64).T)[1].T)
    kept = _first(vectors, values, k)
    whole = float(np.sum(np.square(values)))
    energy = float(np.sum(np.square(values[: kept.shape[1]]))) / whole if whole else 0.0
    return Directions(left @ kept, energy)


def _first(vectors: Matrix, values: Matrix, k: int) -> Matrix:
    """The first k vectors whose singular value is not numerically zero."""
    least = values[0] * max(vectors.shape) * float(np.finfo(np.float32).eps)
    return vectors[:, : min(k, int(np.sum(values > least)))]


def _iterated(d: Matrix, k: int) -> tuple[Matrix, float] | None:
    """Return U_k by subspace iteration, and its error; None if it does not converge."""
    start = np.random.default_rng(0).standard_normal((d.shape[1], k + 10)).astype(d.dtype)
    basis = np.linalg.qr(d @ start)[0]
    for _ in range(ROUNDS):
        product = d @ (d.T @ basis)
        values, turn = np.linalg.eigh(basis.T @ product)
        if values[-1] <= 0:
            return None
        values, turn = values[::-1][:k], turn[:, ::-1][:, :k]
        vectors = basis @ turn
        rest = np.linalg.norm(product @ turn - vectors * values, axis=0)
        error = float(rest.max() / values[0])
        if error <= TOLERANCE:
            return _first(vectors, np.sqrt(np.maximum(values, 0)), k), error
        basis = np.linalg.qr(product)[0]
    return None


def lox(
    aligned: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    k: int = 6,
    alpha: float = 1.25,
) -> dict[str, Any]:
    """Write the extrapolated weights of an aligned model, or of an alignment adapter, to `out`.

    Args:
        aligned: the folder of an adapter, or of a model.
        base: the model before alignment; not needed for an adapter, whose update is D.

    Returns:
        The facts that `DEFENSE` declares.

    Raises:
        ModelError: the folders do not fit together, or do not differ.
        OutputError: `out` cannot be written, or overlaps a source.
        ValueError: `k` or `alpha` cannot be used.
    """
    LoxConfig(k, alpha)
    change = _change_adapter if holds_adapter(Path(aligned)) else _change_model
    return change(Path(aligned), Path(out), base, k, alpha)


def _change_adapter(aligned: Path, out: Path, base: Any, k: int, alpha: float) -> dict[str, Any]:
    """Rewrite B of every module of an adapter."""
    with read_adapter(aligned) as adapter:

        def changed(module: Any) -> tuple[Tensor, Matrix, Directions]:
            b, a = module.b.read().astype(np.float64), module.a.read()
            _check_finite(module.name, a, b)
            found = of_product(b, a, k)
            new = b + alpha * (found.vectors @ (found.vectors.T @ b))
            return module.b, from_float32(new.astype(np.float32), module.b.dtype), found

        return _rewrite(aligned, out, [aligned], [adapter.file], adapter.modules, changed, k, alpha)


def _change_model(aligned: Path, out: Path, base: Any, k: int, alpha: float) -> dict[str, Any]:
    """Rewrite every linear weight of a model."""
    if base is None:
        raise ModelError(f"{aligned} is a model: LoX also needs the model before its alignment, base.")
    with open_sources(aligned, base, base) as sources:  # dW there is D here

        def changed(update: Any) -> tuple[Tensor, Matrix, Directions]:
            d, _, _ = update.load(np.dtype(np.float32))
            _check_finite(update.name, d)
            found = of_matrix(d, k)
            vectors = found.vectors.astype(np.float32)
            return update.target, update.encode(d + np.float32(alpha) * (vectors @ (vectors.T @ d))), found

        folders = list(sources.folders.values())
        return _rewrite(aligned, out, folders, sources.files, sources.updates, changed, k, alpha)


def _check_finite(name: str, *matrices: Matrix) -> None:
    if not all(np.isfinite(matrix).all() for matrix in matrices):
        raise ModelError(f"'{name}' holds values that are not finite. Save it again.")


def _rewrite(
    aligned: Path,
    out: Path,
    sources: list[Path],
    files: Iterable[WeightFile],
    modules: Iterable[Any],
    changed: Callable[[Any], tuple[Tensor, Matrix, Directions]],
    k: int,
    alpha: float,
) -> dict[str, Any]:
    """Copy a folder, and overwrite one tensor for each module unless it stays the same; returns the facts."""
    directions = []
    with new_folder(out, sources) as copy:
        copy_beside(aligned, copy)
        if holds_adapter(aligned):
            name_base(copy)
        for file in files:
            shutil.copyfile(file.path, copy / file.path.name)
        for module in modules:
            tensor, values, found = changed(module)
            if not are_finite(values, tensor.dtype):
                raise ModelError(f"'{tensor.name}' does not fit into {tensor.dtype}. Use a smaller alpha.")
            if alpha and found.energy:
                overwrite(copy, tensor, values)
            directions.append(found)
        if not any(found.energy for found in directions):
            raise ModelError(f"No linear module of {aligned} differs from the model before alignment.")
        facts = _facts(directions, alpha)
        _write_card(copy, facts, k, alpha, holds_adapter(aligned))
    return facts


def _facts(directions: list[Directions], alpha: float) -> dict[str, Any]:
    changed = [one for one in directions if one.energy and alpha]
    return {
        "modules": len(directions),
        "changed": len(changed),
        "energy": sum(one.energy for one in changed) / len(changed) if changed else None,
        "error": max((one.error for one in changed), default=None),
    }


def _write_card(out: Path, facts: dict[str, Any], k: int, alpha: float, adapter: bool) -> None:
    """Write a model card that says what was extrapolated, and that nothing was measured."""
    text = f"""---
library_name: {"peft" if adapter else "transformers"}
tags: [holdfast, lox]
---
# Extrapolated by Holdfast

The first {k} directions of the alignment's update were extrapolated by {alpha:g} in {facts["changed"]} of
{facts["modules"]} modules (LoX, arXiv 2506.15606).

Whether the result is safer after fine-tuning, and what it costs in accuracy, was not measured by this step.
Measure both before you rely on it.
"""
    (out / "README.md").write_text(text, encoding="utf-8", newline="\n")


def apply(tuned: Tuned, *, k: int, alpha: float) -> dict[str, Any]:
    """Change the aligned weights `tuned.source`; see `lox`."""
    return lox(tuned.source, tuned.out, base=tuned.base, k=k, alpha=alpha)


def check(planned: Planned, **parameters: Any) -> None:
    """Check before training that the weights have a layout that can be changed.

    Raises:
        ModelError: the model holds the weights of all experts in one tensor.
    """
    if planned.trains == "full":
        with open_weights(planned.model) as weights:
            refuse_fused_experts(weights)


DEFENSE = Defense(
    name="lox",
    label="LoX",
    stages=("alignment",),
    paper="COLM 2025, arXiv 2506.15606",
    needs=("base",),
    config=LoxConfig,
    apply=apply,
    check=check,
    repairs=("new", "full"),
    facts={
        "modules": "linear modules of the adapter or the model",
        "changed": "modules whose update was extrapolated",
        "energy": "mean share of the squared norm of the update that is extrapolated",
        "error": "largest error of a direction, as a share of the largest squared singular value",
    },
    headline="{changed} of {modules} modules extrapolated",
    strong={"k": 2, "alpha": 1.25},
    identity={"alpha": 0.0},
    protocols={"lisa-code": {"alignment": {"k": 6, "alpha": 1.25}}},
)
