"""Rows that cannot be used: all rows of a source are read, then one message lists them."""

from __future__ import annotations

from holdfast.errors import DataError

SHOWN = 20
"""Number of bad rows that a message lists; the others are counted."""


class BadRows:
    """The bad rows of one source.

    Args:
        path: the source, for messages.
    """

    def __init__(self, path: str):
        self.path = path
        self.count = 0
        self._shown: list[tuple[str, str]] = []
        self._hints: list[str] = []

    def add(self, place: str, reason: str, hint: str = "") -> None:
        """Record a row: its place ("line 3"), what is wrong with it, and a sentence on what to do."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append((place, reason))
            if hint and hint not in self._hints:
                self._hints.append(hint)

    def refuse(self, total: int) -> None:
        """Raise DataError if there are bad rows.

        Args:
            total: the number of rows of the source, bad rows included.
        """
        if not self.count:
            return
        hints = " ".join(self._hints)
        if self.count == 1:
            ((place, reason),) = self._shown
            raise DataError(f"{self.path}, {place}: {reason}. {hints}".strip())
        lines = [f"{self.path}: {self.count:,} of {total:,} rows cannot be used:"]
        lines += [f"  {place}: {reason}" for place, reason in self._shown]
        if self.count > SHOWN:
            lines.append(f"  and {self.count - SHOWN:,} more")
        advice = "Correct them, or drop them with data.skip_bad: true (on the command line: --skip-bad)."
        raise DataError("\n".join([*lines, f"{hints} {advice}".strip()]))

    def places(self) -> list[str]:
        """Return the places of the first bad rows."""
        return [place for place, _ in self._shown]
