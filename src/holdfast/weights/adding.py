"""Adapters of one base model whose updates add up: opened together, and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from holdfast.errors import ModelError
from holdfast.weights.adapter import Adapter, LoraModule, read_adapter
from holdfast.weights.adapter_folder import CONFIG, PREFIX
from holdfast.weights.card import public_name
from holdfast.weights.chains import check_chain
from holdfast.weights.reader import Tensor
from holdfast.weights.writer import same_bytes


@dataclass(frozen=True, eq=False)
class Chain:
    """Adapters of one base model whose updates add up.

    Attributes:
        updates: for each module, the updates of the adapters in order.
        whole: copies of whole tensors that replace those of the base model, by their names in the base model
            (with `.base_layer` if the module also has LoRA).
    """

    adapters: tuple[Adapter, ...]
    updates: Mapping[str, Sequence[LoraModule]]
    whole: Mapping[str, Tensor]

    @property
    def base(self) -> str | None:
        """The base model's name, or None if no adapter records it."""
        return self.setting("base_model_name_or_path")

    @property
    def folders(self) -> list[Path]:
        """The folders of the adapters."""
        return [adapter.folder for adapter in self.adapters]

    @property
    def rank(self) -> int:
        """The largest sum of ranks in a module."""
        return max(sum(part.rank for part in parts) for parts in self.updates.values())

    def setting(self, key: str) -> Any:
        """The value of a setting in the first adapter that has it."""
        return next((a.config[key] for a in self.adapters if a.config.get(key)), None)


@contextmanager
def open_chain(adapters: Sequence[str | Path], in_order: bool = True) -> Iterator[Chain]:
    """Open the adapters and check that they add up. Leaving the block closes their files.

    Args:
        in_order: check that each comes after the adapters that it was trained on top of.

    Raises:
        ModelError: an adapter cannot be read, or the adapters do not add up: different base models, shapes
            or kinds of layers, two adapters with their own copies of a module, or one that is missing below.
    """
    if not adapters:
        raise ModelError("Expected at least one adapter, found none.")
    with ExitStack() as files:
        opened = tuple(files.enter_context(read_adapter(path)) for path in adapters)
        for adapter in opened:
            _check_alone(adapter)
        check_chain([adapter.folder for adapter in opened], in_order)
        for key in ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out"):
            _check_same(opened, key)
        whole = _whole(opened)
        yield Chain(opened, _updates(opened, whole), whole)


def _check_alone(adapter: Adapter) -> None:
    """Refuse an adapter that adds something other than B A to the model."""
    for key in ("alora_invocation_tokens", "trainable_token_indices"):
        if adapter.config.get(key):
            raise ModelError(
                f"{adapter.folder}: {key} is set, so its update does not apply to every token and cannot be "
                "added to others."
            )
    if any(".lora_embedding_" in key for key in adapter.left_alone):
        raise ModelError(
            f"{adapter.folder} has LoRA on embeddings, which is not supported here. Train without it, or "
            "merge it with PEFT (merge_and_unload)."
        )


def _check_same(adapters: Sequence[Adapter], key: str) -> None:
    known = [a for a in adapters if a.config.get(key) is not None]
    for adapter in known[1:]:
        here, there = known[0].config[key], adapter.config[key]
        if here != there and not (key == "base_model_name_or_path" and _one_place(here, there)):
            raise ModelError(
                f"The adapters differ in {key}: {str(here)[:200]!r} in {known[0].folder}, "
                f"{str(there)[:200]!r} in {adapter.folder}. Only adapters of one base model add up. If it is "
                f"the same model, write the same name into each {CONFIG}."
            )


def _one_place(here: Any, there: Any) -> bool:
    """Whether two names are one folder, or one of them is the other without its path."""
    try:
        if Path(here).samefile(there):
            return True
    except (OSError, TypeError, ValueError):
        pass
    texts = [text for text in (here, there) if isinstance(text, str)]
    bare = any(text == PureWindowsPath(text).name for text in texts)
    return len(texts) == 2 and bare and public_name(here) == public_name(there)


def _whole(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Collect copies of whole tensors: trained (`modules_to_save`) or saved with the adapter (LoRA head)."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for key in adapter.left_alone:
            tensor = adapter.file.tensors[key]
            other = found.setdefault(key.removeprefix(PREFIX), tensor)
            if other is not tensor and not same_bytes(other, tensor):
                raise ModelError(
                    f"'{key}' is a whole tensor (modules_to_save, resized embeddings) in two adapters, "
                    f"{other.file.path.parent} and {adapter.folder}, and the two differ; they do not add up. "
                    "Leave one adapter out."
                )
    return found


def _updates(adapters: Sequence[Adapter], whole: Mapping[str, Tensor]) -> dict[str, list[LoraModule]]:
    updates: dict[str, list[LoraModule]] = {}
    for adapter in adapters:
        for module in adapter.modules:
            parts = updates.setdefault(module.name, [])
            if parts and parts[0].shape != module.shape:
                raise ModelError(
                    f"'{module.name}' is {list(parts[0].shape)} in {adapters[0].folder} and "
                    f"{list(module.shape)} in {adapter.folder}: the adapters belong to two architectures."
                )
            if f"{module.name}.weight" in whole:
                raise ModelError(
                    f"'{module.name}' has LoRA in {adapter.folder} and is trained as a whole "
                    "(modules_to_save) in another adapter; these two do not add up. Leave one out."
                )
            parts.append(module)
    if not updates:
        raise ModelError("The adapters hold no LoRA, so there is nothing to combine.")
    return updates
