"""Judges: one file each, found by the registry. A judge reads a prompt and an answer and gives a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from holdfast.errors import RecipeError
from holdfast.evaluation.judges.neutral import MARKERS, neutralise, neutralise_all

__all__ = [
    "MARKERS",
    "Grade",
    "Judge",
    "LoadedJudge",
    "LoadedRater",
    "Verdict",
    "neutralise",
    "neutralise_all",
    "refuse_given",
]


def refuse_given(why: str, **options: Any) -> None:
    """Raise RecipeError for an option that a judge does not use, if it is given; `why` says why not."""
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"{name}: {why}. Leave it out.")


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one answer.

    Attributes:
        verdict: "harmful", "safe", or "unparsed" if the judge gave no verdict (never "safe").
        score: the number behind the verdict, on the judge's own scale, or None.
        raw: the judge's own output: its answer, the categories it flagged, or the words it matched; for
            "unparsed" also the reason.
        without: parameters that a judge's server does not accept, so that the judge was asked without them.
    """

    verdict: Literal["harmful", "safe", "unparsed"]
    score: float | None = None
    raw: Any = None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grade:
    """A judge's rating of an answer to a task.

    Attributes:
        score: rating on the judge's own scale, or None if it gave none (never 0).
        raw: the judge's own output, or the reason why there is no score.
        without: as for `Verdict`.
    """

    score: float | None
    raw: Any = None
    without: tuple[str, ...] = ()


class LoadedJudge(Protocol):
    """A judge that is ready to use.

    A judge may also have `each(prompts, answers)`, which yields the place of each pair and its verdict as
    they come: if the command is stopped, those that have come are kept.
    """

    @property
    def stamp(self) -> str:
        """Name, model and threshold. Results with different stamps are not compared."""
        ...

    @property
    def max_length(self) -> int | None:
        """Maximum tokens of prompt and answer (a classifier) or of the answer; None for no limit."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of pairs in one batch."""
        ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return one verdict for each pair."""
        ...


class LoadedRater(Protocol):
    """A judge of quality that is ready to use; `rate_each` is to `rate` what `LoadedJudge.each` is there."""

    @property
    def stamp(self) -> str:
        """Name and model. Ratings with different stamps are not compared."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of answers in one batch."""
        ...

    def rate(self, talks: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """Return a grade for each answered row of a task, in the unit of the task's metric (percent: 0 to 1).

        Each row has `instruction`, `input`, `target`, and `answers`, one for each of its `turns`.
        """
        ...


@dataclass(frozen=True)
class Judge:
    """The declaration of a judge in a file of `judges/` or an entry point `holdfast.judges`.

    Every argument is a literal or a name: the registry reads the file without importing it.

    Attributes:
        load: `load(path=, threshold=, max_length=, device=)` and the keys in `options`, all by keyword and
            None if the recipe leaves them out; returns a `LoadedJudge`.
        source: the source of the model or the rubric.
        default_path: the model that is loaded if the recipe names none.
        options: further keys of the recipe that it accepts.
        needs: keys of the recipe that it requires.
        measures: "harm" (verdicts; `load` returns a `LoadedJudge`) or "quality" (grades of the answers to a
            task; `load` returns a `LoadedRater`).
        metric: for a judge of quality, the `metric` of the tasks that it can rate.
        title: for a judge of harm, the name of its share of "harmful".
        refusals: whether it looks for refusals and calls every other answer harmful. Such a judge cannot
            filter rows: it would keep only the refusals.
        direction: whether a "lower" or a "higher" score is better.
        check: called before anything starts, with the arguments of `load`; raises if the judge cannot run.
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
    refusals: bool = False
    direction: Literal["lower", "higher"] = "lower"
    check: Callable[..., None] | None = None
