"""The cost of a piece of work: wall and device seconds, peak memory, and energy if the driver reports it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

MAX, SUM = "max", "sum"
"""How the measurements of several processes are combined into one number."""

Over = Callable[[float, str], float]
"""Combines this process's number with those of all processes."""


class Cost:
    """Measures from now on; `earlier` is the cost of an earlier, stopped start of the same work.

    Peak memory is the maximum that CUDA allocated and reserved, or, on a CPU, the maximum resident memory
    over all calls of `look`. Device seconds are the time that devices were held (the wall time of each
    process's GPU) or, on a CPU, the CPU time. Energy is from the GPU's own counter of its whole power, in
    joules.
    """

    def __init__(self, device: str, earlier: Mapping[str, Any] | None = None):
        self.cuda = device.startswith("cuda")
        self.device, self.earlier = device, dict(earlier or {})
        self.process = psutil.Process()
        self.peak = self.process.memory_info().rss
        self.began, self.computed = time.monotonic(), time.process_time()
        self.energy = energy_counter(device)
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    @property
    def seconds(self) -> float:
        """Wall seconds, including those of the earlier start."""
        return float(self.earlier.get("seconds") or 0.0) + time.monotonic() - self.began

    def look(self) -> None:
        """Update the peak of the resident memory; CUDA keeps its own peak."""
        if not self.cuda:
            self.peak = max(self.peak, self.process.memory_info().rss)

    def watching(self, progress: Callable[..., None]) -> Callable[..., None]:
        """A wrapper of `progress` that also calls `look`."""

        def looked(*args: Any, **kwargs: Any) -> None:
            self.look()
            progress(*args, **kwargs)

        return looked

    def facts(
        self, *, tokens: int, steps: int | None = None, over: Over = lambda value, how: value
    ) -> dict[str, Any]:
        """All measurements by name; None means "not measured".

        Args:
            tokens: number of tokens processed since the work began.
            steps: number of optimizer steps, if the work is a training.
            over: combines a number over all processes; every process must call this.
        """
        self.look()
        seconds, earlier = self.seconds, self.earlier
        held = time.monotonic() - self.began if self.cuda else time.process_time() - self.computed
        device_seconds = float(earlier.get("device_seconds") or 0.0) + over(held, SUM)
        peak, reserved = self._memory()
        now = energy_counter(self.device)
        used = over(float("nan") if now is None or self.energy is None else now - self.energy, SUM)
        before = earlier.get("energy_joules", 0.0)
        found: dict[str, Any] = {
            "seconds": seconds,
            "device_seconds": device_seconds,
            "device_time": "devices held" if self.cuda else "cores computing",
            "peak_memory_bytes": int(max(over(peak, MAX), earlier.get("peak_memory_bytes") or 0)),
            "peak_memory_kind": "cuda allocated" if self.cuda else "resident",
            "peak_reserved_bytes": None,
            "energy_joules": None if used != used or before is None else before + used,
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }
        if self.cuda:
            found["peak_reserved_bytes"] = int(
                max(over(reserved, MAX), earlier.get("peak_reserved_bytes") or 0)
            )
        if steps:
            found["seconds_per_1000_steps"] = 1000 * seconds / steps
            found["device_seconds_per_1000_steps"] = 1000 * device_seconds / steps
        return found

    def _memory(self) -> tuple[int, int]:
        if not self.cuda:
            return self.peak, 0
        import torch

        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)


def energy_counter(device: str) -> float | None:
    """Joules that the GPU has used since its driver was loaded; None if they cannot be read.

    Read with NVML (`pip install nvidia-ml-py`), by the GPU's UUID: CUDA's device numbers differ if some GPUs
    are hidden.
    """
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        try:
            name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            gpu = pynvml.nvmlDeviceGetHandleByUUID(name)
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # not installed, no permission, a MIG slice, or a GPU without a counter
        return None
