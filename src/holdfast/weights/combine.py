"""Turn a chain of adapters into one plain adapter, or add all of them to a full model.

The updates of stacked adapters add up, and a sum of low-rank products is one product:

    sum_i s_i B_i A_i = [s_1 B_1 | ... | s_n B_n] [A_1; ...; A_n]

where s_i is the scaling of adapter i, times its weight in the sum if weights are given. So `combine` is exact
up to the float32 rounding of s_i B_i. With `orthogonal`, the output directions of the first update are taken
out of the others before they are added (`orthogonal.py`). The sum is not the model that the user trained if
training ran on weights that had been merged and rounded to bf16.

The combined adapter has one rank r for every module: the largest rank that a module needs. Modules that need
less are padded with zeros. alpha = r, so the scaling is 1. PEFT would accept a rank and an alpha per module,
but servers that read only r and alpha would scale those modules wrongly without an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import ModelError, RecipeError
from holdfast.machine.files import write_json
from holdfast.weights.adapter import LoraModule, natural
from holdfast.weights.adapter_folder import CONFIG, PREFIX, WEIGHTS
from holdfast.weights.adding import Chain, open_chain
from holdfast.weights.card import public_name, write_card
from holdfast.weights.chains import keep_below, same_below
from holdfast.weights.orthogonal import column_basis, overlap, without
from holdfast.weights.own_tokenizer import copy_tokenizer
from holdfast.weights.serving import how_to_serve
from holdfast.weights.writer import (
    Entry,
    float_entry,
    new_folder,
    raw_entry,
    write_tensors,
)

Weight = float | Mapping[str, float]
"""The weight of an adapter's update in a sum, or that of each module by name; 0 for a module without one."""


@dataclass(frozen=True)
class Combined:
    """The result of `combine`.

    Attributes:
        folder: the combined adapter.
        rank: r of every module.
        modules: the number of adapted modules.
        padded: the number of modules that needed less than r.
        overlap: with `orthogonal`, the mean share of an update's squared norm that lies in the directions of
            the first one, over the modules of both; None if there are none.
        serve: the options of the server that it was checked for.
    """

    folder: Path
    rank: int
    modules: int
    padded: int
    overlap: float | None = None
    serve: str = ""


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[Weight] | None = None,
    orthogonal: float | None = None,
    server: str | None = None,
) -> Combined:
    """Write one plain PEFT adapter that is equivalent to `adapters` stacked.

    Args:
        adapters: adapter folders or Hub ids for one base model, with any ranks, scalings and targets.
        out: a new folder.
        weights: the factor of each adapter's update in the sum, or of each of its modules; 1 by default. With
            weights, the sum may be one for use on top of adapters that are not part of it.
        orthogonal: a, from 0 (a plain sum) to 1: each update dW after the first becomes (I - a Q Q^T) dW,
            where Q is an orthonormal basis of the columns of the first one's B. The adapters must have been
            trained on top of the same adapters, and the sum is used on top of them.
        server: "vllm", "sglang" or "tgi": check that this server can serve the result.

    Raises:
        ModelError: an adapter is missing, damaged or not a plain LoRA; or the adapters do not add up; or an
            adapter with a weight other than 1 has copies of whole tensors (`modules_to_save`); or `server`
            cannot serve the result.
        OutputError: `out` is not new, is inside an adapter folder, or cannot be written.
        RecipeError: `weights` or `orthogonal` cannot be used.
    """
    _check_numbers(adapters, weights, orthogonal)
    with open_chain(adapters, in_order=weights is None and orthogonal is None) as chain:
        first = None if orthogonal is None else chain.adapters[0].file.path
        below = None if orthogonal is None else same_below(chain.folders)
        overlaps = [one for parts in chain.updates.values() for one in _overlaps(parts, first)]
        chain = _weighted(chain, weights) if weights is not None else chain
        rank = chain.rank
        serve = how_to_serve(_config(chain), chain.updates, server) if server is not None else ""
        tensors: dict[str, Entry] = {}
        for name in sorted(chain.updates, key=natural):
            tensors |= _stacked(name, chain.updates[name], rank, first, orthogonal or 0.0)
        for name, tensor in chain.whole.items():
            tensors[f"{PREFIX}{name}"] = raw_entry(tensor)
        with new_folder(Path(out), chain.folders) as folder:
            write_tensors(folder / WEIGHTS, tensors)
            write_json(folder / CONFIG, _config(chain), indent=2)
            copy_tokenizer(chain.folders, folder)
            write_card(folder, "combined", chain.base, chain.folders)
            if below is not None:
                keep_below(below, folder)
        needed = [sum(part.rank for part in parts) for parts in chain.updates.values()]
        mean = sum(overlaps) / len(overlaps) if overlaps else None
        return Combined(Path(out), rank, len(needed), sum(n < rank for n in needed), mean, serve)


def _check_numbers(
    adapters: Sequence[Any], weights: Sequence[Weight] | None, orthogonal: float | None
) -> None:
    """Raise RecipeError if the weights or `orthogonal` cannot be used."""
    if weights is not None and len(weights) != len(adapters):
        raise RecipeError(f"Expected one weight for each of {len(adapters)} adapters, found {len(weights)}.")
    plain = [weight for weight in weights or () if not isinstance(weight, Mapping)]
    if not all(math.isfinite(weight) for weight in plain):
        raise RecipeError(f"The weights must be finite numbers, found {', '.join(map(str, plain))}.")
    if orthogonal is not None and not 0 <= orthogonal <= 1:
        raise RecipeError(f"orthogonal must be a share from 0 to 1, found {orthogonal}.")


def _overlaps(parts: Sequence[LoraModule], first: Path | None) -> list[float]:
    """The overlap of each update of a module with that of the first adapter."""
    mine = next((part for part in parts if part.b.file.path == first), None)
    if mine is None:
        return []
    found = [overlap(mine, part) for part in parts if part is not mine]
    return [one for one in found if one is not None]


def _weighted(chain: Chain, weights: Sequence[Weight]) -> Chain:
    """The chain with each update times its weight; updates of weight 0 are left out if others remain.

    A module that no adapter gives a weight by name is left out.
    """
    factors: dict[Path, Weight] = {}
    for adapter, weight in zip(chain.adapters, weights, strict=True):
        if adapter.left_alone and weight != 1:
            raise ModelError(
                f"{adapter.folder} holds whole tensors (modules_to_save, resized embeddings), such as "
                f"'{adapter.left_alone[0]}', which cannot be weighted. Train without them."
            )
        factors[adapter.file.path] = weight

    def factor(part: LoraModule) -> float | None:
        weight = factors[part.b.file.path]
        return weight.get(part.name) if isinstance(weight, Mapping) else weight

    updates = {}
    for name, parts in chain.updates.items():
        given = [(part, own) for part in parts if (own := factor(part)) is not None]
        kept = [(part, own) for part, own in given if own] or given[:1]
        if kept:
            updates[name] = [replace(part, scaling=part.scaling * own) for part, own in kept]
    return replace(chain, updates=updates)


def _stacked(
    name: str, parts: Sequence[LoraModule], rank: int, first: Path | None, orthogonal: float
) -> dict[str, Entry]:
    """A (rank x in) and B (out x rank) of one module in float32; they are read when they are written.

    The directions of the update of the adapter file `first` are taken out of the others.
    """
    out, inner = parts[0].shape
    mine = next((part for part in parts if part.b.file.path == first), None)

    def a() -> Iterator[Any]:
        for part in parts:
            yield part.a.read()
        yield np.zeros((rank - sum(part.rank for part in parts), inner), np.float32)

    def b() -> Iterator[Any]:
        joined, column = np.zeros((out, rank), np.float32), 0
        basis = None if mine is None or not orthogonal else column_basis(mine.b.read())
        for part in parts:
            place = joined[:, column : column + part.rank]
            values = part.b.read()
            if basis is not None and part is not mine:
                values = without(values, basis, orthogonal).astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                np.multiply(values, np.float32(part.scaling), out=place)
            column += part.rank
        if not np.isfinite(joined).all():
            raise ModelError(
                f"'{name}': the scalings, or the weights of the sum, make B too large for float32."
            )
        yield joined

    return {
        f"{PREFIX}{name}.lora_A.weight": float_entry("F32", (rank, inner), a()),
        f"{PREFIX}{name}.lora_B.weight": float_entry("F32", (out, rank), b()),
    }


def _config(chain: Chain) -> dict[str, Any]:
    """Build a PEFT configuration. Its targets are full module names, so no pattern has to match."""
    saved: list[str] = []
    for adapter in chain.adapters:
        names = adapter.config.get("modules_to_save") or []
        saved += [names] if isinstance(names, str) else names
    return {
        "peft_type": "LORA",
        "peft_version": chain.setting("peft_version"),
        "task_type": chain.setting("task_type"),
        "auto_mapping": chain.setting("auto_mapping"),
        "base_model_name_or_path": public_name(chain.base) if chain.base else None,
        "revision": chain.setting("revision"),
        "inference_mode": True,
        "r": chain.rank,
        "lora_alpha": chain.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": bool(chain.setting("fan_in_fan_out")),
        "target_modules": sorted(chain.updates, key=natural),
        "modules_to_save": sorted(set(saved)) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }
