"""Write new folders of weights under a temporary name and rename them, so none is ever seen half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import OutputError
from holdfast.machine.files import mode, read_json, replace_folder
from holdfast.machine.scratch import temporary
from holdfast.weights.files import safe_path
from holdfast.weights.reader import Tensor, row_blocks

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Bytes per value, by the name of the dtype in a safetensors header."""
BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that belong to a model or an adapter in addition to its weights."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        dtype: in the spelling of safetensors: "BF16", "F16", "F32", ...
        nbytes: the total size of `blocks`.
        blocks: its bytes in order, iterated once, after the tensors before it are written.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Iterable[Any]


def float_entry(dtype: str, shape: tuple[int, ...], blocks: Iterable[Any]) -> Entry:
    """Return an `Entry` whose size follows from its dtype (one of `BYTES`) and shape."""
    return Entry(dtype, shape, math.prod(shape) * BYTES[dtype], blocks)


def raw_entry(tensor: Tensor) -> Entry:
    """Return an `Entry` that copies a tensor on disk byte for byte."""
    return Entry(tensor.dtype, tensor.shape, tensor.nbytes, _raw_blocks(tensor))


def _raw_blocks(tensor: Tensor) -> Iterator[Any]:
    for first, last in row_blocks(tensor):
        yield tensor.raw(first, last)


def same_bytes(here: Tensor, there: Tensor) -> bool:
    """Whether two tensors on disk have the same dtype, shape and bytes."""
    if (here.dtype, here.shape) != (there.dtype, there.shape):
        return False
    return all(np.array_equal(here.raw(*rows), there.raw(*rows)) for rows in row_blocks(here))


@contextmanager
def new_folder(out: Path, sources: Iterable[Path], record: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder next to `out`. It is renamed to `out` at the end, or deleted on failure.

    Args:
        sources: folders that must not change.
        record: name of a JSON file of ours; an existing folder that contains it is an earlier result and is
            replaced.

    Raises:
        OutputError: `out` is not new, empty or an earlier result; it overlaps a source; or it cannot be
            written.
    """
    check_new(out, sources, record)
    place = Path(os.path.realpath(out))
    try:
        with temporary(place, folder=True) as scratch:
            yield scratch
            scratch.chmod(mode(0o777))
            replace_folder(scratch, place)
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}. Nothing was written.") from None


def check_new(out: Path, sources: Iterable[Path], record: str | None = None) -> None:
    """Refuse an output folder that is not empty or that would change a source.

    Raises:
        OutputError: as in `new_folder`.
    """
    place = Path(os.path.realpath(out))
    for source in sources:
        home = Path(os.path.realpath(source))
        if place.is_relative_to(home) or home.is_relative_to(place):
            raise OutputError(
                f"The output folder {out} overlaps {source}, which must not change. Give another --out."
            )
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputError(f"Expected a new output folder, found a file or link: {out}.")
        if out.exists() and any(out.iterdir()) and not (record and _is_ours(out / record)):
            who = " and was not made by this command" if record else ""
            raise OutputError(f"{out} is not empty{who}; nothing was written. Give a new folder with --out.")
    except OSError as error:
        raise OutputError(f"Cannot write to {out}: {error.strerror or error}.") from None


def _is_ours(record: Path) -> bool:
    try:
        return "holdfast" in read_json(record)
    except (OSError, ValueError, TypeError):
        return False


def copy_beside(source: Path, folder: Path, leave: Iterable[str] = ()) -> None:
    """Copy the files that belong to weights: configuration, tokenizer, templates, code, licence.

    Raises:
        ModelError: a file is a link out of `source`.
    """
    names = {path.name for pattern in BESIDE for path in source.glob(pattern) if not path.is_dir()}
    for name in sorted(names - {"trainer_state.json", *leave}):
        shutil.copyfile(safe_path(source, name), folder / name)


def overwrite(folder: Path, tensor: Tensor, values: NDArray[np.uint8]) -> None:
    """Replace the bytes of `tensor` in the copy of its file in `folder`; nothing else in it changes."""
    if values.nbytes != tensor.nbytes:
        raise ValueError(f"{tensor.name} has {tensor.nbytes} bytes, not {values.nbytes}")
    with (folder / tensor.file.path.name).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(values.data)


def write_tensors(path: Path, tensors: Mapping[str, Entry]) -> int:
    """Write a safetensors file with one block of one tensor in memory. Return the size of all tensors."""
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
