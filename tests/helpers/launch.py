"""Two processes on this machine, as a launcher would start them, but forked: imports are loaded only once, here.

accelerate does not shard on a CPU: it silently uses DDP instead of FSDP. `sharding` overrides that, and
every test asserts which one it got.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp

from warm import warm

WORLD = 2


def start(
    folder: Path, work: Any, *arguments: Any, fsdp: str | None = None, timeout: float = 240
) -> list[Any]:
    """Exit codes of `work(*arguments)` in every process, which all end within `timeout` seconds.

    Args:
        folder: tracebacks go to `error-RANK.txt` there.
        fsdp: FSDP2 with this state dict type instead of DDP.
    """
    warm()
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_child, args=(rank, port, folder, fsdp, work, arguments))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    last = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, last - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} processes did not end in {timeout} s"
    return [process.exitcode for process in processes]


def done(folder: Path, work: Any, *arguments: Any, **options: Any) -> None:
    """`start`, and assert that every process ends without an error."""
    codes = start(folder, work, *arguments, **options)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
    assert codes == [0] * WORLD, errors


def _child(rank: int, port: int, folder: Path, fsdp: str | None, work: Any, arguments: Any) -> None:
    gc.freeze()  # a garbage collection would copy the parent's memory
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    fresh()
    if fsdp:
        sharding(fsdp)
    try:
        work(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def fresh() -> None:
    """Forget what the parent found out about its own process."""
    from accelerate.state import AcceleratorState

    from holdfast.machine.processes import launched

    launched.cache_clear()
    AcceleratorState._reset_state(reset_partial_state=True)


def sharding(state_dict_type: str) -> None:
    """FSDP2 as `accelerate launch` requests it, also on a CPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": state_dict_type,
    }
    initialise = AcceleratorState.__init__

    def with_sharding(self: Any, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = with_sharding  # type: ignore[method-assign]


def rank() -> int:
    """Which process this is."""
    return int(os.environ["RANK"])


def write(path: Path, value: Any) -> None:
    """Write JSON from a process for its test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
