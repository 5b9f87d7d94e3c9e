"""Add a chain of adapters to the weights of a model, W + sum_i s_i B_i A_i, and stream them to a folder.

The output has the files and tensors of the base model; one block of rows is in memory at a time. Sums are
computed in float32 and rounded once, to the dtype of the weight (PEFT rounds the update first, then the sum).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import ModelError
from holdfast.machine.files import write_json
from holdfast.weights.adapter import LoraModule
from holdfast.weights.adding import Chain, open_chain
from holdfast.weights.card import write_card
from holdfast.weights.floats import FLOATS, are_finite, from_float32
from holdfast.weights.folders import fingerprint
from holdfast.weights.matching import find_weight, is_transposed, model_config
from holdfast.weights.own_tokenizer import check_tokens, copy_tokenizer
from holdfast.weights.reader import INDEX, SINGLE, Tensor, Weights, open_weights, row_blocks
from holdfast.weights.writer import (
    Entry,
    copy_beside,
    float_entry,
    new_folder,
    raw_entry,
    write_tensors,
)

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Merged:
    """The result of `merge`.

    Attributes:
        folder: the full model.
        changed: how many tensors of the base model changed.
        tensors: how many tensors the model has.
        nbytes: size of all tensors.
    """

    folder: Path
    changed: int
    tensors: int
    nbytes: int


def merge(
    base: str | Path, adapters: Sequence[str | Path], out: str | Path, *, dtype: str | None = None
) -> Merged:
    """Write the model `base` with `adapters` added to its weights.

    Args:
        base: a model folder or Hub id with plain weights (bf16, fp16, fp32), in any number of files.
        adapters: as for `combine`.
        out: a new folder.
        dtype: dtype of the floating-point weights: "bfloat16", "float16" or "float32". Default: unchanged.

    Raises:
        ModelError: the model or an adapter is missing, damaged, quantised or not finite, or they do not fit
            together.
        OutputError: `out` is not new, is inside a source, or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"Expected a dtype out of {', '.join(DTYPES)}, found '{dtype}'.")
    with open_weights(base) as weights, open_chain(adapters) as chain:
        config = _config(weights)
        updates = _updates(weights, chain)
        copies = {_place(weights, name): tensor for name, tensor in chain.whole.items()}
        _check_copies(weights, copies)
        if isinstance(rows := _of_text(config).get("vocab_size"), int):
            check_tokens(chain.folders, rows)
        entries = {}
        for name, tensor in weights.items():
            turned = _turned(tensor, updates.get(name, ()), config)
            entries[name] = _entry(tensor, turned, copies.get(name), DTYPES.get(dtype or ""))
        changed = {*updates, *copies}
        tied = {name for name in changed if _tied(weights, name, config)}
        if tied:
            raise ModelError(
                f"'{min(tied)}' is both the embedding and the output head (tied weights), so an update of "
                "one of them cannot be merged. Use the adapter instead."
            )
        with new_folder(Path(out), [weights.folder, *chain.folders]) as folder:
            copy_beside(weights.folder, folder, leave=[INDEX])
            copy_tokenizer(chain.folders, folder)
            if dtype:
                write_json(folder / "config.json", _with_dtype(config, dtype), indent=2)
            size = _write(weights, entries, folder)
            note = f" (fingerprint `{fingerprint(weights.folder)}`)"
            write_card(folder, "merged", str(base), chain.folders, note)
        return Merged(Path(out), len(changed), len(entries), size)


def _config(weights: Weights) -> Mapping[str, Any]:
    config = model_config(weights)
    if config.get("quantization_config"):
        raise ModelError(
            f"{weights.folder} is a quantised model; adding to its weights would round them twice. Give the "
            "folder of the unquantised model."
        )
    return config


def _of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model, also of a multimodal one."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration with `dtype` in place of every dtype that it names."""
    changed = {}
    for key, value in config.items():
        said = dtype if key in ("dtype", "torch_dtype") else value
        changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else said
    return changed


def _place(weights: Weights, name: str) -> str:
    """Return the name on disk of a tensor that an adapter has a copy of."""
    module, _, part = name.replace(".base_layer.", ".").rpartition(".")
    place = f"{find_weight(weights, module).name.removesuffix('.weight')}.{part}"
    if place not in weights:
        raise ModelError(f"{weights.folder} has no '{place}', but an adapter holds a copy of it.")
    return place


def _updates(weights: Weights, chain: Chain) -> dict[str, Sequence[LoraModule]]:
    """Return the updates by the names of the weights on disk."""
    found: dict[str, Sequence[LoraModule]] = {}
    for module, parts in chain.updates.items():
        tensor = find_weight(weights, module)
        tensor.check_floats()
        found[tensor.name] = parts
    return found


def _check_copies(weights: Weights, copies: Mapping[str, Tensor]) -> None:
    for name, whole in copies.items():
        whole.check_floats()
        if whole.shape != weights[name].shape:
            raise ModelError(
                f"'{name}' has shape {list(weights[name].shape)} in {weights.folder}, but the adapter's "
                f"trained copy has {list(whole.shape)}: the adapter is for another model or vocabulary."
            )


def _tied(weights: Weights, name: str, config: Mapping[str, Any]) -> bool:
    """Whether a weight has a row for every token and is the only such weight, or is tied to the other one."""
    settings = _of_text(config)
    rows = settings.get("vocab_size")
    tables = [key for key, tensor in weights.items() if len(tensor.shape) == 2 and tensor.shape[0] == rows]
    return name in tables and (len(tables) < 2 or bool(settings.get("tie_word_embeddings")))


def _turned(
    tensor: Tensor, parts: Sequence[LoraModule], config: Mapping[str, Any]
) -> list[tuple[LoraModule, bool]]:
    """Return the updates of a weight, each with whether the weight is stored as (in, out)."""
    return [(part, is_transposed(part, tensor, config.get("model_type"))) for part in parts]


def _entry(
    tensor: Tensor, parts: Sequence[tuple[LoraModule, bool]], whole: Tensor | None, dtype: str | None
) -> Entry:
    """Return the entry to write for a tensor of the base model."""
    if tensor.dtype not in FLOATS or (not parts and whole is None and dtype in (None, tensor.dtype)):
        return replace(raw_entry(tensor), blocks=_copied(tensor))
    target = dtype or tensor.dtype
    return float_entry(target, tensor.shape, _blocks(whole or tensor, parts, target))


def _copied(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a tensor, checked to be finite numbers if they are numbers."""
    for first, last in row_blocks(tensor):
        raw = tensor.raw(first, last)
        if tensor.dtype in FLOATS and tensor.shape and not are_finite(raw, tensor.dtype):
            raise _not_finite(tensor)
        yield raw


def _not_finite(tensor: Tensor) -> ModelError:
    return ModelError(
        f"'{tensor.name}' of {tensor.file.path.parent} holds values that are not finite (NaN or infinity), "
        "or an adapter's update makes them so. Save or fetch the weights again."
    )


def _blocks(tensor: Tensor, parts: Sequence[tuple[LoraModule, bool]], dtype: str) -> Iterator[Any]:
    """W + sum_i s_i B_i A_i in blocks of rows, rounded to `dtype`; W^T if it is stored transposed."""
    factors = []
    for part, transposed in parts:
        a, b = part.a.read(), part.b.read() * np.float32(part.scaling)
        factors.append((a.T, b.T) if transposed else (b, a))
    for first, last in row_blocks(tensor):
        rows = tensor.read(first, last)
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            for left, right in factors:
                rows += left[first:last] @ right
        # A single number may be a mask that old checkpoints keep, not a weight.
        if tensor.shape and not np.isfinite(rows).all():
            raise _not_finite(tensor)
        written = from_float32(rows, dtype)
        if dtype == "F16" and np.isinf(written.view("<f2")).any() and np.isfinite(rows).all():
            raise ModelError(f"'{tensor.name}' does not fit into float16. Use bfloat16 or float32.")
        yield written


def _write(weights: Weights, entries: Mapping[str, Entry], folder: Path) -> int:
    """Write the files of the base model with the new entries, and the index if there are several files."""
    total = 0
    places: dict[str, str] = {}
    for file in weights.files:
        name = file.path.name if len(weights.files) > 1 else SINGLE
        total += write_tensors(folder / name, {key: entries[key] for key in file.tensors})
        places |= dict.fromkeys(file.tensors, name)
    if len(weights.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / INDEX, index, indent=2)
    return total
