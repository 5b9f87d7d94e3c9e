"""The updates dW that Safe LoRA projects, each with its V, from an adapter or from full weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from holdfast.defenses.safe_lora_parts.projection import Difference, Direction, LowRank, Matrix, Workspace
from holdfast.errors import ModelError, RecipeError
from holdfast.weights.adapter import Adapter, LoraModule, kind_of, layer_of, natural, read_adapter
from holdfast.weights.adapter_folder import CONFIG
from holdfast.weights.floats import from_float32
from holdfast.weights.folders import holds_adapter
from holdfast.weights.matching import (
    CONV1D,
    check_pair,
    find_weight,
    is_transposed,
    linear_weights,
    model_config,
)
from holdfast.weights.reader import Tensor, WeightFile, Weights, open_weights, same_content


class Pair(Protocol):
    """The source of V of one module."""

    def direction(self, workspace: Workspace) -> Direction:
        """Return V, to be read with the buffers of one thread."""
        ...


@dataclass(frozen=True, eq=False)
class WeightPair:
    """V is the difference of two weights on disk."""

    aligned: Tensor
    base: Tensor
    transposed: bool

    def direction(self, workspace: Workspace) -> Direction:
        """See `Pair`."""
        return Difference(self.aligned, self.base, self.transposed, workspace)


@dataclass(frozen=True, eq=False)
class AdapterPair:
    """V is the update of an alignment adapter: the aligned model is the base with this adapter."""

    module: LoraModule | None
    shape: tuple[int, int]

    def direction(self, workspace: Workspace) -> Direction:
        """See `Pair`; V is zero if the adapter does not adapt the module."""
        if self.module is None:
            return LowRank(np.zeros((self.shape[0], 0)), np.zeros((0, self.shape[1])), 1.0)
        return LowRank(self.module.b.read(), self.module.a.read(), self.module.scaling)


@dataclass(frozen=True, eq=False)
class Update:
    """dW = scaling * B A of one module.

    Attributes:
        name: name of the module.
        target: the tensor that the projection rewrites.
        pair: the source of its V.
    """

    name: str
    target: Tensor
    pair: Pair

    @property
    def layer(self) -> int | None:
        """The first number in the name."""
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        """The last part of the name that is not a number."""
        return kind_of(self.name)

    def load(self, dtype: np.dtype) -> tuple[Matrix, Matrix | None, float]:
        """Return B (out x r), A (r x in; None for the identity) and the scaling."""
        raise NotImplementedError

    def encode(self, b: Matrix) -> NDArray[np.uint8]:
        """Return the bytes of `target` for another B."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class LoraUpdate(Update):
    """The update of a LoRA module; the projection rewrites its B."""

    module: LoraModule

    def load(self, dtype: np.dtype) -> tuple[Matrix, Matrix | None, float]:
        """See `Update`."""
        return self.module.b.read().astype(dtype, copy=False), self.module.a.read(), self.module.scaling

    def encode(self, b: Matrix) -> NDArray[np.uint8]:
        """See `Update`."""
        return from_float32(b.astype(np.float32, copy=False), self.target.dtype)


@dataclass(frozen=True, eq=False)
class FullUpdate(Update):
    """W_finetuned - W_aligned; the projection rewrites the weight."""

    aligned: Tensor
    transposed: bool

    def load(self, dtype: np.dtype) -> tuple[Matrix, Matrix | None, float]:
        """See `Update`."""
        update = self.target.read().astype(dtype, copy=False)
        update -= self.aligned.read()
        return np.ascontiguousarray(update.T) if self.transposed else update, None, 1.0

    def encode(self, b: Matrix) -> NDArray[np.uint8]:
        """See `Update`."""
        weight = self.aligned.read() + (b.T if self.transposed else b)
        return from_float32(weight.astype(np.float32, copy=False), self.target.dtype)


@dataclass(eq=False)
class Sources:
    """All inputs. It is a context manager that closes the files on exit.

    Attributes:
        folder: folder of the adapter or of the fine-tuned model.
        full: whether it is a fine-tuned model.
        updates: the updates in the order of layers.
        files: the weight files in `folder`.
        folders: the folders of "adapter", "base" and "aligned".
        fingerprints: fingerprints of their weight files.
        left_alone: tensors that are copied unchanged and not examined.
    """

    folder: Path
    full: bool
    updates: Sequence[Update]
    files: Sequence[WeightFile]
    folders: dict[str, Path]
    fingerprints: dict[str, str]
    left_alone: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def open_sources(adapter: str | Path, base: str | Path, aligned: str | Path) -> Sources:
    """Open the updates of an adapter, or of a folder of full weights, with their V. Only headers are read.

    Args:
        aligned: a model, or the folder of an alignment adapter on `base`.

    Raises:
        ModelError: a source is missing, does not fit, or is not supported; nothing is skipped.
        RecipeError: full weights with an adapter as `aligned`.
    """
    with ExitStack() as stack:
        bases = stack.enter_context(open_weights(base))
        full = _is_full(adapter)
        if is_adapter(aligned):
            if full:
                raise RecipeError(
                    f"aligned is an adapter ({aligned}), but the model to repair is a full model. Give the "
                    "folder of the merged aligned model."
                )
            guide = stack.enter_context(read_adapter(aligned))
            aligned_files, aligned_folder = [guide.file], guide.folder
            opened: Adapter | Weights = guide
        else:
            opened = stack.enter_context(open_weights(aligned))
            aligned_files, aligned_folder = opened.files, opened.folder
        if full:
            assert isinstance(opened, Weights)
            tuned = stack.enter_context(open_weights(adapter))
            folder, files, notes = tuned.folder, tuned.files, []
            updates, left_alone = _full_updates(tuned, bases, opened)
            if left_alone:
                kinds = sorted({kind_of(name.removesuffix(".weight")) for name in left_alone})
                notes.append(f"Left as they are (not linear layers, or output heads): {', '.join(kinds)}.")
        else:
            lora = stack.enter_context(read_adapter(adapter))
            folder, files, notes = lora.folder, [lora.file], list(lora.notes)
            updates, left_alone = lora_updates(lora, bases, opened), lora.left_alone
        read = {"adapter": files, "base": bases.files, "aligned": aligned_files}
        prints = {role: fingerprint_files(opened) for role, opened in read.items()}
        for role, given in (("base", base), ("aligned", aligned)):
            if prints["adapter"] == prints[role] and same_content(read["adapter"], read[role]):
                raise ModelError(
                    f"The model to repair ({adapter}) and the {role} model ({given}) are the same. Give "
                    "the fine-tuned one first."
                )
        return Sources(
            folder,
            full,
            sorted(updates, key=lambda update: natural(update.name)),
            files,
            {"adapter": folder, "base": bases.folder, "aligned": aligned_folder},
            prints,
            left_alone,
            notes,
            stack.pop_all(),
        )
    raise AssertionError  # unreachable: an ExitStack suppresses no exception


def _is_full(path: str | Path) -> bool:
    folder = Path(path)
    return (folder / "config.json").is_file() and not holds_adapter(folder)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter, itself or in a subfolder."""
    folder = Path(path)
    if holds_adapter(folder):
        return True
    return not (folder / "config.json").exists() and any(folder.glob(f"*/{CONFIG}"))


def lora_updates(adapter: Adapter, base: Weights, aligned: Adapter | Weights) -> list[Update]:
    """Return the update of every module of an adapter with its V.

    Raises:
        ModelError: a module has no weight in `base` or `aligned`, or it does not fit.
    """
    if not adapter.modules:
        raise ModelError(f"{adapter.folder} holds no LoRA on a linear module; nothing can be projected.")
    model_type = model_config(base).get("model_type")
    guides = {m.name: m for m in aligned.modules} if isinstance(aligned, Adapter) else {}
    if isinstance(aligned, Adapter) and not guides.keys() & {m.name for m in adapter.modules}:
        raise ModelError(
            f"The alignment adapter {aligned.folder} adapts none of the modules of {adapter.folder}: V is "
            "zero everywhere. Give the aligned model that the adapter was trained on."
        )
    updates: list[Update] = []
    for module in adapter.modules:
        if module.rank > sum(module.shape):
            raise ModelError(
                f"'{module.name}' has rank {module.rank}, more than its weight has rows and columns."
            )
        weight = find_weight(base, module.name)
        transposed = is_transposed(module, weight, model_type)
        pair: Pair
        if isinstance(aligned, Adapter):
            guide = guides.get(module.name)
            if guide is not None and guide.shape != module.shape:
                raise ModelError(
                    f"'{module.name}' has different shapes in {aligned.folder} and {adapter.folder}."
                )
            pair = AdapterPair(guide, module.shape)
        else:
            pair = _weight_pair(find_weight(aligned, module.name), weight, transposed)
        updates.append(LoraUpdate(module.name, module.b, pair, module))
    return updates


def _full_updates(tuned: Weights, base: Weights, aligned: Weights) -> tuple[list[Update], tuple[str, ...]]:
    model_type = str(model_config(tuned).get("model_type"))
    linear = linear_weights(tuned)
    refuse_fused_experts(tuned)
    if not linear:
        raise ModelError(f"{tuned.folder} holds no linear weights; nothing can be projected.")
    updates: list[Update] = []
    for name, tensor in linear.items():
        tensor.check_floats()
        pair = _weight_pair(
            find_weight(aligned, name), find_weight(base, name), kind_of(name) in CONV1D.get(model_type, ())
        )
        if pair.aligned.shape != tensor.shape:
            raise ModelError(
                f"'{tensor.name}' has shape {list(tensor.shape)} in {tuned.folder}, but "
                f"{list(pair.aligned.shape)} in the aligned model. The model was tuned from another model."
            )
        updates.append(FullUpdate(name, tensor, pair, pair.aligned, pair.transposed))
    projected = {update.target.name for update in updates}
    return updates, tuple(sorted(name for name in tuned if name not in projected))


def refuse_fused_experts(weights: Weights) -> None:
    """Raise ModelError if a model holds the weights of all experts in one tensor."""
    for name, tensor in weights.items():
        if len(tensor.shape) > 2 and "expert" in name:
            raise ModelError(
                f"'{name}' in {weights.folder} holds the weights of all experts in one tensor of shape "
                f"{list(tensor.shape)}, which is not supported. Fine-tune with LoRA on other modules instead."
            )


def _weight_pair(aligned: Tensor, base: Tensor, transposed: bool) -> WeightPair:
    check_pair(aligned, base)
    return WeightPair(aligned, base, transposed)


def fingerprint_files(files: Sequence[WeightFile]) -> str:
    """Twelve hex digits of a sample of each weight file, for the record; files that differ may share them."""
    import hashlib

    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.name.encode())
        digest.update(file.sample())
    return digest.hexdigest()[:12]
