"""V of named modules without an update on disk, for methods that use it while they train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast.defenses import Planned
from holdfast.defenses.safe_lora_parts.projection import Matrix
from holdfast.defenses.safe_lora_parts.updates import fingerprint_files
from holdfast.errors import ModelError, RecipeError
from holdfast.weights.adapter import read_adapter
from holdfast.weights.folders import holds_adapter
from holdfast.weights.matching import check_pair, find_weight, linear_weights
from holdfast.weights.reader import open_weights


@dataclass(frozen=True, eq=False)
class Found:
    """V of one module: `left` (out x in), or `left` times `right` if the alignment is an adapter."""

    name: str
    left: Matrix
    right: Matrix | None
    dtype: str


def read_directions(
    modules: Mapping[str, bool], base: str | Path | None, aligned: str | Path
) -> Iterator[Found]:
    """Yield V = W_aligned - W_base of each module that has one, a module at a time, in float32.

    Args:
        modules: by name in the base model, whether its weight is stored as (in, out).
        base: the folder of the model before alignment; not needed for an adapter.
        aligned: the folder of the aligned model, or of an alignment adapter on the base.

    Raises:
        ModelError: a folder cannot be read, the two do not fit, a weight is not finite, or no module has V.
    """
    count = 0
    for found in (_of_adapter if holds_adapter(Path(aligned)) else _of_models)(modules, base, aligned):
        if not all(np.isfinite(part).all() for part in (found.left, found.right) if part is not None):
            raise ModelError(f"'{found.name}' holds values that are not finite, in {aligned} or {base}.")
        if found.left.any() and (found.right is None or found.right.any()):
            count += 1
            yield found
    if not count:
        raise ModelError(
            f"{aligned} changes none of the modules that the LoRA adapts, so there is no direction. Give "
            "both common target_modules."
        )


def _of_adapter(modules: Mapping[str, bool], base: str | Path | None, aligned: str | Path) -> Iterator[Found]:
    with read_adapter(aligned) as adapter:
        for module in adapter.modules:
            if module.name in modules:
                left = module.b.read() * np.float32(module.scaling)
                yield Found(module.name, left, module.a.read(), "F32")


def _of_models(modules: Mapping[str, bool], base: str | Path | None, aligned: str | Path) -> Iterator[Found]:
    if base is None:
        raise ModelError(f"{aligned} is a model: its direction also needs the model before alignment, base.")
    with ExitStack() as files:
        after, before = (files.enter_context(open_weights(folder)) for folder in (aligned, base))
        for name, transposed in modules.items():
            pair = find_weight(after, name), find_weight(before, name)
            check_pair(*pair)
            v = pair[0].read()
            v -= pair[1].read()
            yield Found(name, np.ascontiguousarray(v.T) if transposed else v, None, pair[0].dtype)


def identify(base: str | Path | None, aligned: str | Path) -> str:
    """Return twelve hex digits of a sample of the weight files that V is read from."""
    with ExitStack() as files:
        if holds_adapter(Path(aligned)):
            return fingerprint_files([files.enter_context(read_adapter(aligned)).file])
        models = [
            files.enter_context(open_weights(folder)) for folder in (aligned, base) if folder is not None
        ]
        return fingerprint_files([file for model in models for file in model.files])


def modules_with_direction(planned: Planned) -> set[str]:
    """Return the modules that a stage changes and that have V, before anything is trained.

    Raises:
        RecipeError: there are none.
        ModelError: the weights of the base cannot be read, or are of another architecture.
    """
    with open_weights(planned.base or planned.model) as base, open_weights(planned.model) as model:
        found = linear_weights(model)
        for name, weight in found.items():
            check_pair(weight, find_weight(base, name))
    adapted = [part for part in (planned.tuned_modules, planned.aligned_modules) if part is not None]
    modules = set.intersection(*adapted) if adapted else set(found)
    if not modules:
        raise RecipeError(
            "The alignment's LoRA adapts none of the modules of the user's, so that there is no direction "
            "from base to aligned. Give both common target_modules."
        )
    return modules
