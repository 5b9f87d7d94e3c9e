"""What a long job tells whoever watches. The library is silent; the command passes one that draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Advance = Callable[[int, int], None]
"""Called with the units done and the units in total."""


def nobody(done: int, total: int) -> None:
    """An `Advance` that tells nobody."""


class Progress:
    """Every method does nothing; override those of interest."""

    def begin(self, title: str, resumed: bool) -> None:
        """A step starts, or goes on from what an earlier run left."""

    def advance(self, done: int, total: int, **facts: Any) -> None:
        """`done` of `total` units; `facts` may hold loss, state, tokens_per_second."""

    def end(self, title: str, cached: bool, seconds: float | None) -> None:
        """A step is complete; `cached` if an earlier run had completed it."""

    def say(self, text: str) -> None:
        """A sentence for the user."""
