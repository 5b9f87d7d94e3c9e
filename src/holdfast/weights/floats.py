"""Convert bf16, fp16, fp32 and fp64 bytes to float32 arrays and back; numpy has no bf16 (half a float32)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FLOATS = ("BF16", "F16", "F32", "F64")
"""The dtypes that can be read as float32, in the spelling of safetensors."""


def to_float32(raw: NDArray[np.uint8], dtype: str, out: Floats | None = None) -> Floats:
    """Return the values of little-endian bytes of one of `FLOATS`, flat, in `out` (same length) if given."""
    if dtype == "BF16":
        out = np.empty(raw.size // 2, np.float32) if out is None else out
        np.left_shift(raw.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
        return out
    values = raw.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    if out is None:
        return values.astype(np.float32)
    np.copyto(out, values, casting="same_kind")
    return out


def from_float32(values: Floats, dtype: str) -> NDArray[np.uint8]:
    """Return `values` as little-endian bytes of one of `FLOATS`, flat, rounded to nearest, ties to even."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # values beyond fp16 become infinity; the caller checks
            return flat.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).view(np.uint8)
    bits = flat.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(flat), (bits >> 16) | 0x40, rounded)  # the carry could turn a NaN into 0
    return rounded.astype("<u2").view(np.uint8)


EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""The integer type of the same size, and the bits of the exponent; all are set in infinity and NaN."""


def are_finite(raw: NDArray[np.uint8], dtype: str) -> bool:
    """Whether bytes of one of `FLOATS` hold neither NaN nor infinity."""
    if dtype == "F64":
        return bool(np.isfinite(raw.view("<f8")).all())
    integer, bits = EXPONENTS[dtype]
    return not bool(((raw.view(integer) & bits) == bits).any())
