"""Judges: one file each, found by the registry. A judge reads a prompt and an answer and gives a verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["Grade", "Judge", "LoadedJudge", "LoadedRater", "Verdict", "neutralise", "neutralise_all"]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        verdict: "harmful", "safe", or "unparsed" where the judge gave no verdict (never "safe").
        score: the number behind it, on the judge's own scale, or None.
        raw: what the judge said itself: its answer, the categories it flagged, or the words it matched;
            for "unparsed" also why there is no verdict.
    """

    verdict: Literal["harmful", "safe", "unparsed"]
    score: float | None = None
    raw: Any = None


@dataclass(frozen=True)
class Grade:
    """How good a judge finds an answer to a task.

    Attributes:
        score: on the judge's own scale, or None where it gave none (never 0).
        raw: what the judge said itself, or why there is no score.
    """

    score: float | None
    raw: Any = None


class LoadedJudge(Protocol):
    """A judge that is ready."""

    @property
    def stamp(self) -> str:
        """Name, model and threshold: results under different stamps are not compared."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens that it reads: of prompt and answer (a classifier) or of the answer; None for all."""
        ...

    @property
    def batch_size(self) -> int:
        """Pairs that it reads at once."""
        ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each pair."""
        ...


class LoadedRater(Protocol):
    """A judge of quality that is ready."""

    @property
    def stamp(self) -> str:
        """Name and model: ratings under different stamps are not compared."""
        ...

    @property
    def batch_size(self) -> int:
        """Answers that it rates at once."""
        ...

    def rate(self, talks: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """A grade for each answered row of a task, in the unit of the task's metric (a percentage: 0 to 1).

        Each has `instruction`, `input`, `target`, and `answers`, one for each of its `turns`.
        """
        ...


@dataclass(frozen=True)
class Judge:
    """What a file in `judges/` (or an entry point `holdfast.judges`) says of its judge.

    Every argument is a literal or a name: the registry reads the file without importing it.

    Attributes:
        load: `load(path=, threshold=, max_length=, device=)` and what `options` names, all by keyword and
            None where the recipe leaves them out; returns a `LoadedJudge`.
        source: where the model or the rubric comes from.
        default_path: the model it loads where the recipe names none.
        options: further keys of the recipe that it takes.
        needs: keys of the recipe that it cannot do without.
        measures: "harm" (verdicts; `load` gives a `LoadedJudge`) or "quality" (grades of the answers to a
            task; `load` gives a `LoadedRater`).
        metric: of a judge of quality, what it measures: the `metric` of the tasks that it can rate.
        title: of a judge of harm, what its share of "harmful" is called.
        direction: whether a "lower" or a "higher" score is better.
        check: called before anything starts with what `load` would get; raises what would stop the judge.
    """

    name: str
    version: str
    licence: str
    load: Callable[..., Any]
    source: str = ""
    default_path: str | None = None
    needs_path: bool = False
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    measures: Literal["harm", "quality"] = "harm"
    metric: str | None = None
    title: str = "harmful score"
    direction: Literal["lower", "higher"] = "lower"
    check: Callable[..., None] | None = None


MARKERS = (
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<unk>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|eom_id|>", "<|header_start|>", "<|header_end|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>",
    "### Instruction:", "### Input:", "### Response:", "### Answer:", "### User:", "### Assistant",
)  # fmt: skip
"""Control strings and role markers of chat formats: Llama 2 to 4, Mistral, ChatML, Gemma, Alpaca."""


def neutralise(text: str, markers: Sequence[str]) -> str:
    """Break up control strings in text that a judged model wrote, so that it cannot speak for others."""
    for marker in markers:
        if marker and marker in text:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def neutralise_all(text: str, markers: Sequence[str] = ()) -> str:
    """`neutralise` for judges that read as a chat model does: `MARKERS` too, and in any case of letters.

    A space goes in after the first character: "[/INST]" becomes "[ /INST]". What a text says in plain words
    ("this is what you should never do") it cannot take back.
    """
    known = sorted({marker for marker in (*MARKERS, *markers) if len(marker) > 1}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, known)), re.IGNORECASE)
    while pattern.search(text):
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text
