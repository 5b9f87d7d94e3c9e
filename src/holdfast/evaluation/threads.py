"""Work in threads that a signal to the command does not wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


GRACE = 5.0
"""Seconds for open calls to finish after one of them has failed for all."""


def as_finished(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Iterator[tuple[int, Result]]:
    """Call `work` on every item, several at once; yield the place of an item and its result as they finish.

    The threads are daemons. If the caller stops (Ctrl-C), no further item is started, and the process can end
    at once although calls are still open. If `work` raises an error, the results of calls that end within
    `GRACE` are yielded, then the error is raised.
    """
    waiting, lock, stop = iter(enumerate(items)), threading.Lock(), threading.Event()
    finished: SimpleQueue[tuple[int, Result] | BaseException | None] = SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with lock:
                one = next(waiting, None)
            if one is None:
                break
            try:
                finished.put((one[0], work(one[1])))
            except BaseException as error:  # it is raised again in the caller's thread
                stop.set()
                finished.put(error)
        finished.put(None)

    count = min(threads, len(items))
    for _ in range(count):
        threading.Thread(target=run, daemon=True).start()
    failure: BaseException | None = None
    try:
        last = 0.0
        while count:
            try:
                found = finished.get(timeout=max(0.0, last - time.monotonic()) if failure else None)
            except Empty:
                break
            if found is None:
                count -= 1
            elif isinstance(found, BaseException):
                last = last or time.monotonic() + GRACE
                failure = failure or found
            else:
                yield found
    finally:
        stop.set()
    if failure is not None:
        raise failure
