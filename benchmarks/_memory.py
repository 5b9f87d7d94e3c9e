"""Peak bytes of live tensors on the CPU, from the allocator's own reports, which do not vary between runs."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_live_bytes(work: Callable[[], Any]) -> int:
    """The maximum number of bytes that tensors created in `work()` held at one time.

    Build the model inside `work`, so that its weights are counted.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
        gc.collect()  # tensors of an earlier run in reference cycles would count as live
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def held_bytes(model: Any) -> int:
    """Bytes of a model's weights and buffers, including bitsandbytes' state of quantised weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        while state is not None:
            tensors += [t for t in vars(state).values() if torch.is_tensor(t)]
            state = state.state2
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
