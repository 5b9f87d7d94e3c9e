"""What each worker of a machine uses: GPUs that a step has alone, and main memory.

A claim is a file `claims/LABEL.json` in the folder of the sweep. The head removes those of dead workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from holdfast.machine.files import read_json, write_json
from holdfast.study.resources import Need


def take(
    folder: Path, label: str, need: Need, device: str | None, devices: Sequence[str]
) -> list[str] | None:
    """Claim what a step needs, and return its GPUs; None if other steps use too much of it now.

    Args:
        folder: the folder of the sweep.
        label: the worker.
        device: the GPU of the worker; None on a machine without GPUs.
        devices: all GPUs.
    """
    (folder / "claims").mkdir(exist_ok=True)
    with FileLock(folder / ".claims.lock"):
        others = _others(folder, label)
        if need.memory and others and sum(one["memory"] for one in others) + need.memory > memory():
            return None
        used = {name for one in others for name in one["devices"]}
        alone = {name for one in others if len(one["devices"]) > 1 for name in one["devices"]}
        mine = [device] if device is not None and need.gpus else []
        if need.gpus > 1:
            free = sorted((name for name in devices if name not in used), key=lambda name: name != device)
            if len(free) < need.gpus:
                return None
            mine = free[: need.gpus]
        elif alone & set(mine):
            return None
        write_json(folder / "claims" / f"{label}.json", {"devices": mine, "memory": need.memory or 0})
        return mine


def release(folder: Path, label: str) -> None:
    """Remove the claim of a worker."""
    (folder / "claims" / f"{label}.json").unlink(missing_ok=True)


def memory() -> int:
    """Return the main memory of this machine in bytes."""
    import psutil

    return int(psutil.virtual_memory().total)


def _others(folder: Path, label: str) -> list[dict[str, Any]]:
    found = []
    for path in folder.glob("claims/*.json"):
        if path.stem != label:
            with contextlib.suppress(OSError, ValueError):
                found.append(read_json(path))
    return found
