"""The order in which the steps of a study can run: each step after those that it reads."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping


class Graph:
    """Hands out the steps whose parents are done, the first of the study first.

    All calls together take time in proportion to the steps and their parents.

    Args:
        parents: by step, the steps that it reads; a step comes after them.
    """

    def __init__(self, parents: Mapping[str, Iterable[str]]):
        self._names = list(parents)
        self._place = {name: place for place, name in enumerate(self._names)}
        self._children: dict[str, list[str]] = {name: [] for name in self._names}
        self._missing: dict[str, int] = {}
        for name, needed in parents.items():
            needed = [parent for parent in needed if parent in self._place]
            self._missing[name] = len(needed)
            for parent in needed:
                self._children[parent].append(name)
        self._ready = [place for place, name in enumerate(self._names) if not self._missing[name]]
        self._ended: set[str] = set()
        self.stopped: set[str] = set()

    @property
    def left(self) -> int:
        """The number of steps that are not done, failed or stopped."""
        return len(self._names) - len(self._ended)

    def pop(self) -> str | None:
        """Return the first step that is ready; None if no step is."""
        while self._ready:
            name = self._names[heapq.heappop(self._ready)]
            if name not in self._ended:
                return name
        return None

    def back(self, names: Iterable[str]) -> None:
        """Make steps ready again that `pop` returned."""
        for name in names:
            heapq.heappush(self._ready, self._place[name])

    def done(self, name: str) -> None:
        """Note that a step is complete; steps that waited only for it are ready."""
        if name in self._ended:
            return
        self._ended.add(name)
        for child in self._children[name]:
            self._missing[child] -= 1
            if not self._missing[child]:
                heapq.heappush(self._ready, self._place[child])

    def fail(self, name: str) -> None:
        """Note that a step failed; those that need it are `stopped`."""
        self._ended.add(name)
        left = list(self._children[name])
        while left:
            child = left.pop()
            if child not in self.stopped:
                self.stopped.add(child)
                self._ended.add(child)
                left += self._children[child]
