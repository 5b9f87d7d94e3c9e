"""Take the output directions of one LoRA update out of another, without building a dense matrix.

With Q, an orthonormal basis of the columns of B_1, and dW_2 = s B_2 A_2,

    (I - a Q Q^T) dW_2 = s (B_2 - a Q Q^T B_2) A_2

so only B_2 changes. Q comes from an SVD instead of a QR decomposition, because B_1 may have a lower rank than
columns, and QR would then add directions that are not its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import ModelError
from holdfast.weights.adapter import LoraModule

Matrix = NDArray[Any]


def column_basis(b: Matrix) -> Matrix:
    """Return an orthonormal basis of the columns of `b` in float64, without numerically zero directions.

    Raises:
        ModelError: `b` holds infinities or NaN.
    """
    if not np.isfinite(b).all():
        raise ModelError("An adapter holds values that are not finite. Save it again.")
    vectors, values, _ = np.linalg.svd(b.astype(np.float64), full_matrices=False)
    least = values[0] * max(b.shape) * float(np.finfo(np.float32).eps) if len(values) else 0.0
    return vectors[:, values > least]


def without(b: Matrix, basis: Matrix, share: float) -> Matrix:
    """Return B - share * Q Q^T B, in float64."""
    wide = b.astype(np.float64)
    return wide - share * (basis @ (basis.T @ wide))


def overlap(first: LoraModule, other: LoraModule) -> float | None:
    """Return the share of ||dW_2||_F squared in the output directions of dW_1; None if dW_2 is zero."""
    b, a = other.b.read().astype(np.float64), other.a.read().astype(np.float64)
    inner, inside = a @ a.T, column_basis(first.b.read()).T @ b
    whole = float(np.sum((b.T @ b) * inner))
    return float(np.sum((inside.T @ inside) * inner)) / whole if whole > 0 else None
