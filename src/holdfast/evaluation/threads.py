"""Work in threads that a signal to the command does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_finished(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Iterator[tuple[int, Result]]:
    """Call `work` on every item, several at once; yield the place of an item and its result as they finish.

    The threads are daemons. If the caller stops (Ctrl-C), no further item is started, and the process can end
    at once although calls are still open. If `work` raises an error, the items that are already started are
    finished and yielded, then the error is raised.
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
        while count:
            found = finished.get()
            if found is None:
                count -= 1
            elif isinstance(found, BaseException):
                failure = failure or found
            else:
                yield found
    finally:
        stop.set()
    if failure is not None:
        raise failure
