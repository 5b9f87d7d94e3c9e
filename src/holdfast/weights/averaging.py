"""Weighted averages of whole models, a block of rows of one tensor in memory, and copies that change nothing.

W = (1 - lambda) W_tuned + lambda W_other + gamma (W_other - W_base)
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import ModelError
from holdfast.weights.adapter import read_adapter
from holdfast.weights.floats import FLOATS, are_finite, from_float32
from holdfast.weights.reader import Tensor, WeightFile, Weights, open_weights, row_blocks
from holdfast.weights.writer import copy_beside, float_entry, new_folder, raw_entry, write_tensors


def copy_adapter(source: Path, out: Path) -> int:
    """Copy an adapter byte for byte; returns the number of its modules."""
    with read_adapter(source) as adapter:
        _copy(source, out, [adapter.file])
        return len(adapter.modules)


def copy_weights(source: Path, out: Path) -> int:
    """Copy a model byte for byte; returns the number of its tensors."""
    with open_weights(source) as weights:
        _copy(source, out, weights.files)
        return len(weights)


def _copy(source: Path, out: Path, files: Collection[WeightFile]) -> None:
    with new_folder(out, [source]) as folder:
        copy_beside(source, folder)
        for file in files:
            shutil.copyfile(file.path, folder / file.path.name)


def average_model(
    tuned: Path,
    out: Path,
    other: Path,
    lambda_: float,
    base: Path | None = None,
    gamma: float = 0.0,
    names: Collection[str] | None = None,
) -> tuple[int, int]:
    """Write the average of `tuned` and `other`, in the files and the dtypes of `tuned`.

    The arithmetic is float32, rounded once. A term with coefficient 0 or 1 rounds nothing.

    Args:
        base: the model that is subtracted in the term of `gamma`.
        names: the tensors to average; the others are copied byte for byte. By default, all.

    Returns:
        The number of tensors, and how many of them were averaged.

    Raises:
        ModelError: the models do not fit together, or the average holds NaN or infinity.
        OutputError: `out` cannot be written.
    """
    with ExitStack() as files:
        weights = files.enter_context(open_weights(tuned))
        others = files.enter_context(open_weights(other))
        bases = files.enter_context(open_weights(base)) if base else others
        entries, changed = {}, 0
        for name, tensor in weights.items():
            there = None if names is not None and name not in names else _same(others, tensor)
            if there is None or tensor.dtype not in FLOATS:
                entries[name] = raw_entry(tensor)
            else:
                blocks = _blocks(tensor, there, _same(bases, tensor), lambda_, gamma)
                entries[name] = float_entry(tensor.dtype, tensor.shape, blocks)
                changed += 1
        with new_folder(out, [tuned, other, *([base] if base else [])]) as folder:
            copy_beside(weights.folder, folder)
            for file in weights.files:
                write_tensors(folder / file.path.name, {name: entries[name] for name in file.tensors})
        return len(weights), changed


def _same(weights: Weights, tensor: Tensor) -> Tensor:
    """Return the tensor of the same name and shape in another model."""
    found = weights.get(tensor.name)
    if found is None or found.shape != tensor.shape:
        has = "no such tensor" if found is None else f"one of shape {list(found.shape)}"
        raise ModelError(
            f"'{tensor.name}' has shape {list(tensor.shape)} in {tensor.file.path.parent}, but "
            f"{weights.folder} has {has}. Only models of one architecture can be averaged."
        )
    return found


def _blocks(tensor: Tensor, other: Tensor, base: Tensor, lambda_: float, gamma: float) -> Iterator[Any]:
    """The average by blocks of rows."""
    for rows in row_blocks(tensor):
        guide = other.read(*rows)
        found = np.float32(1 - lambda_) * tensor.read(*rows) + np.float32(lambda_) * guide
        if gamma:
            found += np.float32(gamma) * (guide - base.read(*rows))
        written = from_float32(found, tensor.dtype)
        if tensor.shape and not are_finite(written, tensor.dtype):
            raise ModelError(
                f"The average of '{tensor.name}' holds values that are not finite (NaN or infinity). Check "
                "the weights of both models, or use a smaller gamma."
            )
        yield written
