"""Several processes of one command: the main one decides and speaks, all train together.

`torchrun` and `accelerate launch` start the same command once for each device. The main process (rank 0)
does every step of a run; the others wait for its orders and join it in training. Orders and failures go
through the key-value store that the launcher offers (the one that torch.distributed meets at), apart from
the group that training uses: waiting has no time limit, whatever the backend, and can be interrupted.
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
"""Seconds in which the main process is the one to report what went wrong everywhere."""

PATIENCE = 10.0
"""Seconds that a process has to end by itself when another one has failed."""


class Processes:
    """This process among those that were started together. With a `count` of 1 nothing here does anything.

    Attributes:
        rank, count: which process this is, of how many.
        local_rank: which one on its machine.
        sharded: whether the launcher asks for FSDP or DeepSpeed, which place the model themselves.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, sharded: bool = False):
        self.rank, self.count, self.local_rank, self.sharded = rank, count, local_rank, sharded
        self._store: Any = None
        self._turn = 0
        self._state = "at work"

    @property
    def main(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def start(self) -> None:
        """Meet the others, and end with them from here on; a second call does nothing."""
        self._state = "at work"
        if self.count == 1 or self._store is not None:
            return
        import torch.distributed as distributed

        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(minutes=30)))
        self._store = distributed.PrefixStore("holdfast", store)
        # What ends a process from outside shall also leave a message, locks and the terminal in order.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Thread(target=self._end_with_the_others, daemon=True).start()

    def tell(self, order: Any) -> None:
        """The main process says what all do next; `order` is what JSON can hold."""
        if self.count > 1:
            self._turn += 1
            self._store.set(f"order/{self._turn}", json.dumps(order))

    def told(self) -> Any:
        """The next order; waits for it as long as it takes.

        Raises:
            StepFailed: another process failed meanwhile.
        """
        self._turn += 1
        return json.loads(self._wait(f"order/{self._turn}"))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does the block, then the others do: they find the files that it has written."""
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
        """The main process, which may hold the store, waits until all others have come this far."""
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
        """Whether a failure of this process is to be reported by it; the others are told to end.

        It is one process that reports: the main one where all fail alike, otherwise the first that failed.
        """
        if self.count == 1:
            return True
        self._state = "failing"
        try:
            last = time.monotonic() + GRACE
            while not self.main and not self._store.check(["failed"]) and time.monotonic() < last:
                time.sleep(0.05)
            return int(self._store.compare_set("failed", "", str(self.rank))) == self.rank
        except RuntimeError:  # the store went with the process that held it
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
        except RuntimeError:  # the store went with the process that held it, which is the main one
            pass
        raise StepFailed(f"Process {who} of {self.count} failed; its own message says why.")

    def _end_with_the_others(self) -> None:
        """In a thread: a process that another one left may wait for it in a collective for ever."""
        with contextlib.suppress(RuntimeError):  # the store went with the process that held it
            while not self._store.check(["failed"]):
                time.sleep(1.0)
            if int(self._store.get("failed")) == self.rank:
                return
        time.sleep(GRACE)  # what waits for an order, or lost the others, ends by itself
        if self._state == "done":
            return
        if self._state == "at work":
            _thread.interrupt_main()
        time.sleep(PATIENCE)
        os._exit(1)


@cache
def launched() -> Processes:
    """This process as torchrun or accelerate launch describe it; a single one where they did not start it."""
    env = os.environ
    if "LOCAL_RANK" not in env or int(env.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    asked = (env.get("ACCELERATE_USE_FSDP", ""), env.get("ACCELERATE_USE_DEEPSPEED", ""))
    return Processes(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), "true" in asked)
