"""Several processes of one command: the main process decides and reports, and all train together.

`torchrun` and `accelerate launch` start the same command once for each device. The main process (rank 0)
runs every step; the others wait for its orders and join it in training. Orders and failures go
through the launcher's key-value store (the rendezvous store of torch.distributed), separate from the process
group of the training. So waiting has no time limit with any backend, and can be interrupted.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

from holdfast.errors import StepFailed

GRACE = 3.0
"""Seconds that the other processes wait for the main process to report a failure."""

PATIENCE = 10.0
"""Seconds that a process has to end on its own after another process failed."""


class Processes:
    """This process among those that were started together. If `count` is 1, every method does nothing.

    Attributes:
        rank, count: the number of this process, and the number of processes.
        local_rank: the number of this process on its machine.
        sharded: whether the launcher uses FSDP or DeepSpeed, which place the model themselves.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, sharded: bool = False):
        self.rank, self.count, self.local_rank, self.sharded = rank, count, local_rank, sharded
        self._store: Any = None
        self._turn = 0
        self._state = "at work"

    @property
    def main(self) -> bool:
        """Whether this is the main process, which decides, writes and prints."""
        return self.rank == 0

    def start(self) -> None:
        """Connect to the other processes, and end when one of them fails; a second call does nothing."""
        self._state = "at work"
        if self.count == 1 or self._store is not None:
            return
        import torch.distributed as distributed

        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(minutes=30)))
        self._store = distributed.PrefixStore("holdfast", store)
        # SIGTERM acts like Ctrl-C: it also prints a message, releases locks and restores the terminal.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Thread(target=self._end_with_the_others, daemon=True).start()

    def tell(self, order: Any) -> None:
        """Send the next order from the main process to all others; `order` is any JSON value."""
        if self.count > 1:
            self._turn += 1
            self._store.set(f"order/{self._turn}", json.dumps(order))

    def told(self) -> Any:
        """Wait without a time limit for the next order, and return it.

        Raises:
            StepFailed: another process failed in the meantime.
        """
        self._turn += 1
        return json.loads(self._wait(f"order/{self._turn}"))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, then in the others, which find the files it wrote."""
        if self.count == 1:
            yield
            return
        self._turn += 1
        if not self.main:
            self._wait(f"first/{self._turn}")
        yield
        if self.main:
            self._store.set(f"first/{self._turn}", "done")

    def finish(self) -> None:
        """Wait in the main process, which may host the store, until all others have called this."""
        if self.count == 1:
            return
        self._turn += 1
        arrived = self._store.add(f"end/{self._turn}", 1)
        last = time.monotonic() + GRACE
        while self.main and arrived < self.count and time.monotonic() < last:
            time.sleep(0.01)
            arrived = self._store.add(f"end/{self._turn}", 0)
        self._state = "done"

    def speaks(self) -> bool:
        """Whether this process, which failed, reports the failure; the others are told to end.

        Exactly one process reports: the main process if all fail in the same way, else the first that failed.
        """
        if self.count == 1:
            return True
        self._state = "failing"
        try:
            last = time.monotonic() + GRACE
            while not self.main and not self._store.check(["failed"]) and time.monotonic() < last:
                time.sleep(0.05)
            return int(self._store.compare_set("failed", "", str(self.rank))) == self.rank
        except RuntimeError:  # the process that hosted the store has ended
            return self.main

    def _wait(self, key: str) -> bytes:
        pause, who = 0.01, 0
        try:
            while not self._store.check([key]):
                if self._store.check(["failed"]):
                    who = int(self._store.get("failed"))
                    break
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            else:
                return self._store.get(key)
        except RuntimeError:  # the main process, which hosted the store, has ended
            pass
        raise StepFailed(f"Process {who} of {self.count} failed; see its own message for the reason.")

    def _end_with_the_others(self) -> None:
        """Run in a thread: end this process after another failed; a collective would wait for it forever."""
        with contextlib.suppress(RuntimeError):  # the process that hosted the store has ended
            while not self._store.check(["failed"]):
                time.sleep(1.0)
            if int(self._store.get("failed")) == self.rank:
                return
        time.sleep(GRACE)  # a process that waits for an order, or notices the failure, ends on its own
        if self._state == "done":
            return
        if self._state == "at work":
            _thread.interrupt_main()
        time.sleep(PATIENCE)
        os._exit(1)


@cache
def launched() -> Processes:
    """This process as described by torchrun or accelerate launch; a single process if neither started it."""
    env = os.environ
    if "LOCAL_RANK" not in env or int(env.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    asked = (env.get("ACCELERATE_USE_FSDP", ""), env.get("ACCELERATE_USE_DEEPSPEED", ""))
    return Processes(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), "true" in asked)
