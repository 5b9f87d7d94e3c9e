"""The dtype that a model computes in: `auto` is the stored one, or float32 where the stored one is slow."""

from __future__ import annotations

import json
import logging
import time
from functools import cache
from pathlib import Path
from typing import Any

from holdfast.machine.files import read_json

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes of safetensors files."""

logger = logging.getLogger("holdfast.models")


def stored_dtype(folder: Path) -> str:
    """Return the dtype of the weights in a model folder, as its config or a weight file says."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # the loader reports a damaged file
        return "float32"
    config = config if isinstance(config, dict) else {}
    inner = config.get("text_config")
    for block in (config, inner if isinstance(inner, dict) else {}):
        named = block.get("dtype") or block.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
    return next(
        (found for path in sorted(folder.glob("*.safetensors")) if (found := _first(path))), "float32"
    )


def _first(path: Path) -> str | None:
    """Return the dtype of the first floating-point tensor of a weight file, from its header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < 10**8 else {}
        return next((STORED[one["dtype"]] for one in header.values() if one.get("dtype") in STORED), None)
    except (OSError, ValueError, AttributeError):  # the loader reports a damaged file
        return None


def used_dtype(folder: Path, asked: str, device: str) -> str:
    """Return the dtype in which a model computes.

    Args:
        asked: as in a recipe: "auto" or a name, which is obeyed.
        device: "auto", "cpu", "cuda" or "mps".
    """
    stored = stored_dtype(folder)
    if asked != "auto":
        return asked
    if stored not in ("bfloat16", "float16") or computes_fast(stored, device):
        return stored
    return "float32"


def computes_fast(dtype: str, device: str) -> bool:
    """Whether a device has instructions for a 16-bit dtype; without them it is slower than float32."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and dtype == "bfloat16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return True
    return dtype == "bfloat16" and any("bf16" in name for name in _instructions())


@cache
def _instructions() -> frozenset[str]:
    """Return the names of the processor's extensions, as torch knows them, or Linux."""
    import torch

    known = getattr(torch.cpu, "get_capabilities", None)
    if known is not None:
        return frozenset(name for name, has in known().items() if has is True)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(text.split())


def say_dtype(folder: Path, asked: str, used: str, device: str) -> None:
    """Say once if a model computes in another dtype than the stored one, or as asked for in a slow one."""
    stored = stored_dtype(folder)
    if asked == "auto" and used != stored:
        _say(f"{folder} is stored in {stored}, which this device computes slowly; float32 is used.")
    elif asked in ("bfloat16", "float16") and not computes_fast(asked, device):
        _say(
            f"This device computes {asked} slowly: a product of matrices takes {slowdown(asked, device):.1f} "
            "times as long as in float32. It is used, as asked for; write dtype: auto for the faster one."
        )


@cache
def _say(text: str) -> None:
    logger.warning(text)


@cache
def slowdown(dtype: str, device: str, size: int = 256) -> float:
    """Return how many times as long as in float32 a product of two matrices takes."""
    import torch

    def seconds(kind: Any) -> float:
        matrix = torch.ones(size, size, device=device).to(kind)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            (matrix @ matrix).sum().item()
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(getattr(torch, dtype)) / seconds(torch.float32)
