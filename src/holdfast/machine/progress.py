"""Progress of long work. The library reports nothing by default; the command passes an object that draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Advance = Callable[[int, int], None]
"""Called with the number of units done and the total number of units."""


def nobody(done: int, total: int) -> None:
    """An `Advance` that does nothing."""


class Progress:
    """Receives progress. Every method does nothing; override the ones you need."""

    def begin(self, title: str, resumed: bool) -> None:
        """A step starts, or resumes the work of an earlier run."""

    def advance(self, done: int, total: int, **facts: Any) -> None:
        """`done` of `total` units are complete; `facts` may contain loss, state and tokens_per_second."""

    def end(self, title: str, cached: bool, seconds: float | None) -> None:
        """A step is complete; `cached` means that an earlier run completed it."""

    def checking(self, begins: bool) -> None:
        """The checks before a run begin, or are over; in between `advance` counts rows."""

    def say(self, text: str) -> None:
        """Show a message to the user."""
