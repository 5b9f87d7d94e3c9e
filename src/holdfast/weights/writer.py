"""New folders of weights: written beside their place and renamed, so that a half one is never seen."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import OutputError
from holdfast.weights.reader import Tensor

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Bytes of a value, by the dtype's name in a safetensors header."""
BLOCK = 2**24
"""Bytes of a tensor that are in memory at a time, at most."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        dtype: as safetensors writes it: "BF16", "F16", "F32", ...
        nbytes: how many bytes `blocks` give in all.
        blocks: its bytes in order; asked for once, when the tensors before it are written.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Iterable[Any]


def float_entry(dtype: str, shape: tuple[int, ...], blocks: Iterable[Any]) -> Entry:
    """An `Entry` whose size follows from its dtype (one of `BYTES`) and shape."""
    return Entry(dtype, shape, math.prod(shape) * BYTES[dtype], blocks)


def raw_entry(tensor: Tensor) -> Entry:
    """A tensor on disk as it is, byte for byte."""
    return Entry(tensor.dtype, tensor.shape, tensor.nbytes, _raw_blocks(tensor))


def _raw_blocks(tensor: Tensor) -> Iterator[Any]:
    for first, last in row_blocks(tensor):
        yield tensor.raw(first, last)


def same_bytes(here: Tensor, there: Tensor) -> bool:
    """Whether two tensors on disk are alike in dtype, shape and every byte."""
    if (here.dtype, here.shape) != (there.dtype, there.shape):
        return False
    return all(np.array_equal(here.raw(*rows), there.raw(*rows)) for rows in row_blocks(here))


def row_blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The rows of a tensor by blocks of at most `BLOCK` bytes (or one row)."""
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK // max(1, tensor.row_bytes))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


@contextmanager
def new_folder(out: Path, sources: Sequence[Path]) -> Iterator[Path]:
    """A folder beside `out`; it takes the name `out` when the block ends, and goes if the block fails.

    Raises:
        OutputError: `out` is not new or empty, or is or lies in one of `sources`; or it cannot be written.
    """
    check_new(out, sources)
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, out)  # an empty folder in its place is allowed
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}. Nothing was left there.") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_new(out: Path, sources: Sequence[Path]) -> None:
    """Refuse a folder that something stands in or that would change a source.

    Raises:
        OutputError: as `new_folder`.
    """
    place = Path(os.path.realpath(out))
    for source in sources:
        if place.is_relative_to(os.path.realpath(source)):
            raise OutputError(f"{out} is or lies in {source}, which is read. Give another --out.")
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputError(f"Expected a new folder to write to, found a file or link: {out}.")
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} is not empty; nothing was written. Give a new folder with --out.")
    except OSError as error:
        raise OutputError(f"Cannot write to {out}: {error.strerror or error}.") from None


def write_tensors(path: Path, tensors: Mapping[str, Entry]) -> int:
    """Write a safetensors file, one block of one tensor in memory; returns the bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in tensors.items():
            before = file.tell()
            for block in entry.blocks:
                file.write(block)
            assert file.tell() - before == entry.nbytes, name
    return end


def write_json(path: Path, value: Any) -> None:
    """A JSON file as people read it; NaN is refused, because other readers would not read it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
