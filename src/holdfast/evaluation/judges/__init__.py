"""Judges: one file each, found by the registry. A judge reads a prompt and an answer and gives a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        verdict: "harmful", "safe", or "unparsed" where the judge gave no verdict (never "safe").
        score: the number behind it, or None.
        raw: what the judge said itself: the categories it flagged, or the words it matched.
    """

    verdict: Literal["harmful", "safe", "unparsed"]
    score: float | None = None
    raw: Any = None


class LoadedJudge(Protocol):
    """A judge that is ready."""

    @property
    def stamp(self) -> str:
        """Name, model and threshold: results under different stamps are not compared."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and answer that it reads, or None for all."""
        ...

    @property
    def batch_size(self) -> int:
        """Pairs that it reads at once."""
        ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each pair."""
        ...


@dataclass(frozen=True)
class Judge:
    """What a file in `judges/` (or an entry point `holdfast.judges`) says of its judge.

    `load(path=, threshold=, max_length=, device=)` returns a `LoadedJudge`; arguments are None where the
    recipe leaves them out. `default_path` is the model it loads then.
    """

    name: str
    version: str
    licence: str
    load: Callable[..., LoadedJudge]
    default_path: str | None = None
    needs_path: bool = False


def neutralise(text: str, markers: Sequence[str]) -> str:
    """Break up control strings in text that a judged model wrote, so that it cannot speak for others."""
    for marker in markers:
        if marker and marker in text:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text
