"""Choose the device to compute on."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import RecipeError
from holdfast.machine.processes import Processes

SMALL = 50_000_000
"""Number of parameters below which one CPU thread is faster than several."""


def check_name(asked: str) -> None:
    """Raise RecipeError for a device that no machine has; torch is not imported."""
    if asked not in ("auto", "cpu", "cuda", "mps"):
        raise RecipeError(f"Unknown device '{asked}'. Known: auto, cpu, cuda, mps.")


def available(asked: str) -> str:
    """Return the kind of device, which is on this machine.

    Raises:
        RecipeError: this machine has no such device.
    """
    import torch

    check_name(asked)
    device = asked
    if asked == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("No CUDA device was found. Use --device cpu, or leave it out.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("No MPS device was found. Use --device cpu, or leave it out.")
    return device


def choose_device(asked: str, model: Path, processes: Processes) -> str:
    """Return the device to compute on; for a small model, CPU threads are set too.

    Raises:
        RecipeError: this machine has no such device.
    """
    import torch

    from holdfast.weights.folders import parameter_count

    device = available(asked)
    if device == "cuda" and processes.count > 1:  # the same assignment as in accelerate, which trains there
        device = f"cuda:{processes.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if device == "cpu" and parameter_count(model) < SMALL:
        torch.set_num_threads(1)
    return device
