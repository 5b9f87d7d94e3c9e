"""What a piece of work costs: wall and device seconds, peak memory, energy where the driver tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

MAX, SUM = "max", "sum"
"""How what several processes measured becomes one number."""

Over = Callable[[float, str], float]
"""Takes this process's number to that of all processes."""


class Cost:
    """Measures from now on; `earlier` is what an earlier start of the same work had used up.

    Memory is what CUDA allocated and reserved at most, or else the resident memory whenever `look` is called.
    Device seconds are the time that devices were held (wall time for each process's GPU), or on a CPU the
    time that its cores computed. Energy is the GPU's own counter, all of its power, in joules.
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
        """Wall seconds, earlier ones too."""
        return float(self.earlier.get("seconds") or 0.0) + time.monotonic() - self.began

    def look(self) -> None:
        """Take notice of the resident memory; CUDA keeps its own peak."""
        if not self.cuda:
            self.peak = max(self.peak, self.process.memory_info().rss)

    def watching(self, progress: Callable[..., None]) -> Callable[..., None]:
        """`progress` that also looks."""

        def looked(*args: Any, **kwargs: Any) -> None:
            self.look()
            progress(*args, **kwargs)

        return looked

    def facts(
        self, *, tokens: int, steps: int | None = None, over: Over = lambda value, how: value
    ) -> dict[str, Any]:
        """Everything by name; None is "not measured".

        Args:
            tokens: worked on since the beginning of the work.
            steps: optimizer steps, for a training.
            over: from this process to all; every process calls this.
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
    """Joules that the GPU has used since its driver was loaded; None where nothing tells.

    Through NVML (`pip install nvidia-ml-py`), by the GPU's id: CUDA's numbers are others where some GPUs are
    hidden.
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
    except Exception:  # not installed, no permission, a part of a GPU, a GPU without a counter
        return None
