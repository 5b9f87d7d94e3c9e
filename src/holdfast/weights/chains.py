"""The adapters that an adapter was trained on top of: a record in its folder, checked in every chain.

A user delta changes the aligned model, not the base model. On the base model alone it is another model, and
nothing in PEFT's own files says so.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.machine.files import write_json
from holdfast.weights.files import read_config, safe_path
from holdfast.weights.folders import ADAPTER_WEIGHTS

RECORD = "holdfast_adapter.json"
"""The file in an adapter folder that lists the adapters below."""
BELOW = "trained_on_top_of"


def write_below(folder: Path, below: Sequence[Path]) -> None:
    """Record in `folder` the adapters that its adapter was trained on top of; none writes no file."""
    if below:
        found = [{"adapter": _name(path), "sha256": _digest(path)} for path in below]
        write_json(folder / RECORD, {BELOW: found}, indent=2)


def keep_below(source: Path, folder: Path) -> None:
    """Copy the record of `source` to another adapter that is used on top of the same adapters."""
    if (source / RECORD).exists():
        shutil.copyfile(safe_path(source, RECORD), folder / RECORD)


def same_below(adapters: Sequence[Path]) -> Path:
    """Return an adapter that stands for all: they were trained on top of the same adapters.

    Raises:
        ModelError: they were not, or a record is damaged.
    """
    for folder in adapters[1:]:
        if [one["sha256"] for one in _below(folder)] != [one["sha256"] for one in _below(adapters[0])]:
            raise ModelError(
                f"{folder} and {adapters[0]} were not trained on top of the same adapters, so they cannot be "
                "merged side by side. Give two that were."
            )
    return adapters[0]


def check_chain(adapters: Sequence[Path], in_order: bool = True) -> None:
    """Check that no adapter is repeated, and that each comes after those that it was trained on top of.

    Args:
        in_order: False checks only that none is repeated.

    Raises:
        ModelError: an adapter is missing or given twice, or a record is damaged.
    """
    for i, folder in enumerate(adapters):
        if folder.resolve() in [other.resolve() for other in adapters[:i]]:
            raise ModelError(f"{folder} is given twice and would be added twice. Name it once.")
    records = [_below(folder) for folder in adapters] if in_order else []
    if not any(records):
        return
    before: set[str] = set()
    for folder, below in zip(adapters, records, strict=True):
        for needed in below:
            if needed["sha256"] not in before:
                raise ModelError(
                    f"{folder} was trained on top of the adapter {needed['adapter']}, which is not given "
                    "before it. Give both, in the order of training. If that adapter was only saved again, "
                    f"remove {RECORD} from the folder."
                )
        before.add(_digest(folder))


def _below(folder: Path) -> list[dict[str, str]]:
    if not (folder / RECORD).exists():
        return []
    record: Any = read_config(safe_path(folder, RECORD))
    found = record.get(BELOW) if isinstance(record, dict) else None
    keys = ("adapter", "sha256")
    if isinstance(found, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in keys) for one in found
    ):
        return found
    raise ModelError(f"{folder / RECORD} is damaged. Fetch the adapter again.")


def _name(adapter: Path) -> str:
    """The last two parts of a path: every step of a run calls its adapter "adapter"."""
    return "/".join(adapter.resolve().parts[-2:]).lstrip("/")


def _digest(adapter: Path) -> str:
    path = safe_path(adapter, ADAPTER_WEIGHTS)
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from None
