"""Open an adapter folder for any use: find it, and check its files, settings and numbers, without PEFT.

Training, generation, Safe LoRA, soups, `combine` and `merge` open adapters here. What they accept beyond that
differs: PEFT loads more kinds of LoRA than can be read as scaling * B A (see `adapter.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.weights.files import check_regular, read_config, safe_path
from holdfast.weights.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    NAMED_BY,
    check_revision,
    from_hub,
    looks_local,
)
from holdfast.weights.reader import WeightFile

CONFIG, WEIGHTS = ADAPTER_CONFIG, ADAPTER_WEIGHTS
PREFIX = "base_model.model."

INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""

LONGEST_NAME = 1000
"""The longest name of a tensor, in characters."""


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """An adapter whose files were checked. It is a context manager that closes the file on exit.

    Attributes:
        others: the names of other adapters in the folder, which are not read.
    """

    folder: Path
    config: Mapping[str, Any]
    file: WeightFile
    others: tuple[str, ...]

    def __enter__(self) -> AdapterFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def find_adapter(path: str, revision: str | None = None) -> tuple[Path, list[str]]:
    """Return the folder of an adapter folder or Hub id, and the names of other adapters inside it.

    PEFT saves an adapter called "default" into the folder itself and other adapters into subfolders with
    their names; trainers save checkpoints into subfolders. If the folder has no adapter itself and only one
    subfolder has, that subfolder is returned.

    Raises:
        ModelError: there is no adapter, there are several and the path names none of them, or a file in the
            folder is a pipe, a socket or a device.
    """
    folder = Path(path)
    check_revision(path, folder, revision)
    if not folder.exists():
        if looks_local(path):
            raise ModelError(f"No such adapter folder: {path}. PEFT's save_pretrained writes one.")
        folder = from_hub(path, revision, download=True)
    if not folder.is_dir():
        raise ModelError(f"Expected an adapter folder, found a file: {path}.")
    places = {p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{CONFIG}")}
    inner = sorted((place.relative_to(folder).as_posix() for place in places), key=_by_number)
    if (folder / CONFIG).exists() or (folder / CONFIG).is_symlink():
        check_regular(folder, NAMED_BY)
        return folder, inner
    if len(inner) == 1:
        check_regular(folder / inner[0], NAMED_BY)
        return folder / inner[0], []
    if inner:
        shown = ", ".join(inner[:10]) + (", ..." if len(inner) > 10 else "")
        raise ModelError(
            f"{path} holds {len(inner)} adapters: {shown}. Name one: {path.rstrip('/')}/{inner[-1]}"
        )
    raise ModelError(f"Expected an adapter folder with {CONFIG}, found none at {path}.")


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts checkpoint-20 before checkpoint-100."""
    parts = re.split(r"(\d{1,9})", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def check_adapter(folder: Path) -> Path:
    """The folder itself, checked to hold an adapter that can be read without waiting and without pickle.

    Raises:
        ModelError: a file is missing or not a regular file, or the weights are not in safetensors.
    """
    if not (folder / CONFIG).exists():
        raise ModelError(f"Expected an adapter folder with {CONFIG}, found none at {folder}.")
    check_regular(folder, NAMED_BY)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder} holds adapter_model.bin, which can run code when it is loaded. Convert it: load the "
            "adapter with PEFT on a machine where that is safe, and call save_pretrained(NEW_FOLDER)."
        )
    if not (folder / WEIGHTS).exists() and not (folder / WEIGHTS).is_symlink():
        raise ModelError(
            f"{folder / WEIGHTS} is missing. Nothing else is loaded, because a .bin file can run code. Save "
            "the adapter again with PEFT's save_pretrained."
        )
    for name in (CONFIG, WEIGHTS):
        safe_path(folder, name)
    return folder


def open_adapter(path: str | Path, revision: str | None = None) -> AdapterFolder:
    """Open an adapter folder or Hub id, and read all of its tensors once to check them.

    Raises:
        ModelError: the adapter is missing, damaged, in another format, no LoRA or changes the base weights
            when it is loaded; or its tensors are not finite numbers under names that PEFT writes.
    """
    folder, others = find_adapter(str(path), revision)
    config = _settings(folder)
    check_adapter(folder)
    file = WeightFile(safe_path(folder, WEIGHTS))
    try:
        check_tensors(file)
    except BaseException:
        file.close()
        raise
    return AdapterFolder(folder, config, file, tuple(others))


def check_tensors(file: WeightFile) -> None:
    """Check that all tensors are finite numbers under names that PEFT writes.

    Raises:
        ModelError: one is not, or there is none.
    """
    if not file.tensors:
        raise ModelError(f"{file.path} holds no tensors. Save the adapter again.")
    for key, tensor in file.tensors.items():
        if not key.startswith(PREFIX):
            raise ModelError(
                f"{file.path}: PEFT would not load '{key[:200]}', which lacks the prefix '{PREFIX}'. Save "
                "the adapter with PEFT's save_pretrained."
            )
        if len(key) > LONGEST_NAME:
            raise ModelError(f"{file.path}: the name '{key[:80]}...' has {len(key):,} characters.")
        tensor.check_finite()


def _settings(folder: Path) -> dict[str, Any]:
    """Read the configuration of a LoRA."""
    path = folder / CONFIG
    config = read_config(safe_path(folder, CONFIG))
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a table of settings. Save the adapter again.")
    check_settings(path, config)
    return config


def check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Check that settings describe a LoRA whose update is B A.

    Args:
        path: the place of the settings, for messages.

    Raises:
        ModelError: they do not, or a value has the wrong type.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: expected a LoRA adapter (peft_type LORA), found {str(kind)[:80]}.")
    if config.get("megatron_config"):  # PEFT would import a module that the file names
        raise ModelError(
            f"{path}: megatron_config is set; Megatron's layers are not supported. Train with plain LoRA."
        )
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in INITIALISATIONS):
        raise ModelError(
            f"{path}: init_lora_weights is {str(start)[:80]!r}, which may change the base weights too, so "
            "B A is not the whole update. Save it converted (PEFT: path_initial_model_for_weight_conversion)."
        )
    _check_number(path, "r", config.get("r"))
    _check_number(path, "lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{path}: {key} is not a table from module to number. Save the adapter again.")
        for pattern, value in patterns.items():
            _check_number(path, f"{key}[{pattern[:80]!r}]", value)
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        _check_names(path, key, config.get(key))
    for key in ("base_model_name_or_path", "revision", "task_type", "peft_version"):
        if not isinstance(config.get(key), str | None):
            raise ModelError(f"{path}: expected text for {key}, found {str(config[key])[:80]!r}.")
    try:
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # a combined adapter could not be written
        raise ModelError(
            f"{path} holds values that cannot be written as JSON ({str(error)[:80]}). Save the adapter again."
        ) from None


def _check_number(path: Path, key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1e9:
        raise ModelError(f"{path}: expected a positive number for {key}, found {str(value)[:80]!r}.")


def _check_names(path: Path, key: str, value: Any) -> None:
    names = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if value is not None and not all(isinstance(name, str) for name in names):
        raise ModelError(f"{path}: expected a name or a list of names for {key}, found {str(value)[:80]!r}.")
