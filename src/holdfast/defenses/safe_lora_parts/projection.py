"""The arithmetic of Safe LoRA on arrays: V in blocks from disk, C dW and its cosine in d x r operations.

V = W_aligned - W_base (out x in), dW = B A with B (out x r) and A (r x in), C = V V^T / ||V||_F. No matrix of
size out x out is built. With P = V^T B and Q = V P,

    C dW = (Q / ||V||_F) A
    <dW, C dW> = tr(P^T P A A^T) / ||V||_F
    ||C dW|| = sqrt(tr(Q^T Q A A^T)) / ||V||_F,  ||dW|| = sqrt(tr(B^T B A A^T))

The r x r parts are float64. V itself is read, subtracted and multiplied in blocks that stay in cache, twice
(for P, then for Q), so memory does not grow with the size of a weight.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from holdfast.weights.floats import Floats, to_float32
from holdfast.weights.reader import Tensor

Matrix = NDArray[Any]

BLOCK = 2**19
"""Values of V per block: two MiB of float32, so that a block and its sources stay in cache, and each call
of numpy is long enough for several threads to release the interpreter (at half the size they wait for it)."""
UPPER = np.uint32(0xFFFF0000)
"""The upper of two bf16 values that are read as one 32-bit number."""


class Direction(Protocol):
    """V of one module, from any source."""

    shape: tuple[int, int]

    def transpose_times(self, x: Matrix) -> tuple[Matrix, float]:
        """V^T x, and ||V||_F squared."""
        ...

    def times(self, y: Matrix) -> Matrix:
        """V y."""
        ...

    def gram(self) -> NDArray[np.float64]:
        """V V^T or V^T V, whichever is smaller (V V^T for a square V)."""
        ...


class Workspace:
    """Buffers of one thread, reused for every block and module.

    Attributes:
        dtype: dtype of the products, float32 or float64.
        block: values of V per block.
    """

    def __init__(self, dtype: str = "float32", block: int = BLOCK):
        self.dtype = np.dtype(dtype)
        self.block = block
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def floats(self, name: str, size: int) -> Floats:
        """Return an uninitialised buffer of `size` float32 values."""
        return self.bytes(name, 4 * size).view(np.float32)

    def bytes(self, name: str, size: int) -> NDArray[np.uint8]:
        """Return an uninitialised buffer of `size` bytes."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size]


class Difference:
    """V = W_aligned - W_base, from two tensors on disk.

    If both are bf16, two values are read as one 32-bit number: shifting and masking give the values in even
    and in odd columns as float32, twice as fast as widening each value. The columns of a block are then in
    that order. V V^T does not depend on it; if the weight is stored as (in, out), `_order` and `_restore`
    account for it.

    Args:
        transposed: the tensors are stored as (in, out).
    """

    def __init__(self, aligned: Tensor, base: Tensor, transposed: bool, workspace: Workspace):
        self.aligned, self.base, self.transposed, self.workspace = aligned, base, transposed, workspace
        rows, columns = aligned.shape
        self.shape = (columns, rows) if transposed else (rows, columns)
        self.paired = aligned.dtype == base.dtype == "BF16" and columns % 2 == 0 and sys.byteorder == "little"

    def transpose_times(self, x: Matrix) -> tuple[Matrix, float]:
        """V^T x, and ||V||_F squared."""
        product = self._stored_times if self.transposed else self._stored_transpose_times
        squares: list[float] = []
        return product(self._order(x) if self.transposed else x, squares), sum(squares)

    def times(self, y: Matrix) -> Matrix:
        """V y."""
        if self.transposed:
            return self._restore(self._stored_transpose_times(y))
        return self._stored_times(y)

    def gram(self) -> NDArray[np.float64]:
        """V V^T or V^T V, whichever is smaller (V V^T for a square V)."""
        out, into = self.shape
        if (out <= into) != self.transposed:  # over the rows as stored, which needs all of them at once
            rows, columns = self.aligned.shape
            whole = np.empty((rows, columns))
            for first, block in self._blocks():
                whole[first : first + len(block)] = block
            return whole @ whole.T
        columns = self.aligned.shape[1]
        total = np.zeros((columns, columns))
        for _, block in self._blocks():
            wide = block.astype(np.float64)
            total += wide.T @ wide
        return self._restore(self._restore(total).T) if self.transposed else total

    def _stored_times(self, y: Matrix, squares: list[float] | None = None) -> Matrix:
        """S y for the matrix S as it is stored; appends ||block||^2 of each block to `squares`."""
        product = np.empty((self.aligned.shape[0], y.shape[1]), self.workspace.dtype)
        for first, block in self._blocks():
            np.matmul(block, y, out=product[first : first + len(block)])
            if squares is not None:
                squares.append(_squares(block))
        return product

    def _stored_transpose_times(self, x: Matrix, squares: list[float] | None = None) -> Matrix:
        """S^T x for the matrix S as it is stored; appends ||block||^2 of each block to `squares`."""
        total = np.zeros((x.shape[1], self.aligned.shape[1]), self.workspace.dtype)
        part = np.empty_like(total)
        turned = np.ascontiguousarray(x.T)
        for first, block in self._blocks():
            np.matmul(turned[:, first : first + len(block)], block, out=part)
            np.add(total, part, out=total)
            if squares is not None:
                squares.append(_squares(block))
        return np.ascontiguousarray(total.T)

    def _blocks(self) -> Iterator[tuple[int, Matrix]]:
        """Yield the first row of each block of S, and the block, which the next one overwrites."""
        rows, columns = self.aligned.shape
        step = max(1, self.workspace.block // columns)
        for first in range(0, rows, step):
            block = self._block(first, min(first + step, rows))
            yield first, block if self.workspace.dtype == np.float32 else block.astype(self.workspace.dtype)

    def _block(self, first: int, last: int) -> Floats:
        space, columns = self.workspace, self.aligned.shape[1]
        size = (last - first) * columns
        block = space.floats("block", size).reshape(-1, columns)
        raw = [
            tensor.raw(first, last, space.bytes(name, (last - first) * tensor.row_bytes))
            for name, tensor in (("aligned", self.aligned), ("base", self.base))
        ]
        if not self.paired:
            values = [
                to_float32(raw[i], tensor.dtype, space.floats(f"values{i}", size))
                for i, tensor in enumerate((self.aligned, self.base))
            ]
            np.subtract(values[0], values[1], out=block.reshape(-1))
            return block
        half = columns // 2
        pairs = [part.view(np.uint32).reshape(-1, half) for part in raw]
        lower = [space.bytes(f"lower{i}", 2 * size).view(np.uint32).reshape(-1, half) for i in range(2)]
        for pair, low in zip(pairs, lower, strict=True):
            np.left_shift(pair, 16, out=low)
            np.bitwise_and(pair, UPPER, out=pair)
        np.subtract(lower[0].view(np.float32), lower[1].view(np.float32), out=block[:, :half])
        np.subtract(pairs[0].view(np.float32), pairs[1].view(np.float32), out=block[:, half:])
        return block

    def _order(self, x: Matrix) -> Matrix:
        """Return the rows of `x` in the order of a block's columns."""
        return np.concatenate([x[0::2], x[1::2]]) if self.paired else x

    def _restore(self, y: Matrix) -> Matrix:
        """Undo `_order`."""
        if not self.paired:
            return y
        restored, half = np.empty_like(y), len(y) // 2
        restored[0::2], restored[1::2] = y[:half], y[half:]
        return restored


class LowRank:
    """V = scaling * B A of an alignment adapter: the difference of the aligned model from the base."""

    def __init__(self, b: Matrix, a: Matrix, scaling: float):
        self.b, self.a = b.astype(np.float64) * scaling, a.astype(np.float64)
        self.shape = (b.shape[0], a.shape[1])

    def transpose_times(self, x: Matrix) -> tuple[Matrix, float]:
        """V^T x, and ||V||_F squared."""
        squares = float(np.sum((self.b.T @ self.b) * (self.a @ self.a.T)))
        return (self.a.T @ (self.b.T @ x)).astype(x.dtype), max(squares, 0.0)

    def times(self, y: Matrix) -> Matrix:
        """V y."""
        return (self.b @ (self.a @ y)).astype(y.dtype)

    def gram(self) -> NDArray[np.float64]:
        """V V^T or V^T V, whichever is smaller (V V^T for a square V)."""
        if self.shape[0] <= self.shape[1]:
            return self.b @ (self.a @ self.a.T) @ self.b.T
        return self.a.T @ (self.b.T @ self.b) @ self.a


def _squares(block: Matrix) -> float:
    flat = block.reshape(-1)
    return float(np.dot(flat, flat))


@dataclass(frozen=True)
class Measured:
    """Comparison of dW with C dW.

    Attributes:
        cosine: from 0 to 1 (C is positive semi-definite); None if V or dW is zero.
        norm: ||dW||_F.
        approximate_norm: ||C dW||_F.
        direction_norm: ||V||_F.
        moved: V V^T B (out x r): C dW without its scale.
    """

    cosine: float | None
    norm: float
    approximate_norm: float
    direction_norm: float
    moved: Matrix | None


class NotFinite(ValueError):
    """V, or the update, holds infinities or NaN."""


def measure(direction: Direction, b: Matrix, a: Matrix | None) -> Measured:
    """Return the cosine between dW = B A (or B itself if A is None) and C dW.

    Args:
        b: out x r, in the dtype of the products.
        a: r x in.

    Raises:
        NotFinite: V or the update holds infinities or NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        largest = b.dtype.type(np.max(np.abs(b), initial=0.0)) or b.dtype.type(1)
        unit = b / largest  # so that small and large updates stay in the range of float32
        inner = _inner(a)
        norm = _norm(unit, inner)
        if not np.isfinite(largest) or not np.isfinite(norm):
            raise NotFinite("the update")
        p, squares = direction.transpose_times(unit)
        # Below this, float64 cannot distinguish tr(B^T B A A^T) from zero (B and A that cancel each other).
        floor = 0.0 if inner is None else 1e-7 * _norm(unit, None) * float(np.sqrt(np.trace(inner)))
        if np.isfinite(squares) and (norm <= floor or squares == 0):
            return Measured(None, norm * float(largest), 0.0, squares**0.5, None)
        q = direction.times(p)
        if not (np.isfinite(squares) and np.isfinite(p).all() and np.isfinite(q).all()):
            raise NotFinite("W_aligned - W_base")
    length, scale = _norm(q, inner), squares**0.5
    cosine = _norm(p, inner) ** 2 / (length * norm) if length > 0 else 0.0
    return Measured(
        min(max(cosine, 0.0), 1.0),
        norm * float(largest),
        length * float(largest) / scale,
        scale,
        q * largest,
    )


def update_norm(b: Matrix, a: Matrix | None) -> float:
    """Return ||B A||_F, or ||B||_F if A is None, without building B A."""
    return _norm(b, _inner(a))


def _inner(a: Matrix | None) -> Matrix | None:
    if a is None:
        return None
    wide = a.astype(np.float64)
    return wide @ wide.T


def _norm(b: Matrix, inner: Matrix | None) -> float:
    """sqrt(tr(B^T B inner)), in float64."""
    if inner is None:
        return float(np.sqrt(_squares(b)))
    wide = b.astype(np.float64)
    return float(np.sqrt(max(np.sum((wide.T @ wide) * inner), 0.0)))


def approx(measured: Measured) -> Matrix:
    """Return B' = V V^T B / ||V||_F, so that B' A = C dW: the paper's fast form."""
    assert measured.moved is not None
    return measured.moved / measured.moved.dtype.type(measured.direction_norm)


def normalised(measured: Measured) -> Matrix:
    """Return B' in the direction of C dW with the norm of dW; zero if C dW is zero.

    C grows with ||V||, and so does C dW. Without that scale only the direction is left, which shows whether
    the direction or the shrinking has the effect.
    """
    moved = approx(measured)
    if measured.approximate_norm == 0:
        return moved
    return moved * moved.dtype.type(measured.norm / measured.approximate_norm)


def exact(direction: Direction, b: Matrix) -> tuple[Matrix, int]:
    """Return the orthogonal projection of B's columns onto the column space of V, and V's numerical rank.

    V (V^T V)^-1 V^T with a pseudo-inverse, from the eigenvalues of the smaller Gram matrix in float64.
    Singular values up to sigma_max * max(out, in) * 2^-23 count as zero (the default of numpy's
    `matrix_rank` for float32). If the rank is `out`, the projector is the identity, and B is returned.
    """
    gram = direction.gram()
    tolerance = (max(direction.shape) * float(np.finfo(np.float32).eps)) ** 2
    values = np.linalg.eigvalsh(gram)
    rank = int(np.sum(values > max(values[-1], 0.0) * tolerance))
    if rank == direction.shape[0]:
        return b, rank
    if rank == 0:
        return np.zeros_like(b), 0
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[-rank:], vectors[:, -rank:]
    if direction.shape[0] <= direction.shape[1]:  # V V^T = U S^2 U^T: the projector is U U^T
        return (vectors @ (vectors.T @ b)).astype(b.dtype), rank
    p = direction.transpose_times(b)[0]  # V^T V = W S^2 W^T: the projector is V W S^-2 W^T V^T
    inside = vectors @ ((vectors.T @ p) / values[:, None])
    return direction.times(np.ascontiguousarray(inside.astype(b.dtype))), rank
