"""Data sets by name: the form of their rows and the grading of answers; one file per data set.

A file of this folder ends in ``TASK = Task(...)`` (a user task with a grader) or ``TASK = SafetyData(...)``
(harmful, safe or over-refusal questions: for alignment, poison and test prompts), whose arguments are
literals or names. No other file has to be edited. Another package provides the same object with the entry
point ``holdfast.tasks``. A row is a dict with ``instruction``, ``input`` ("" for none), ``output`` and
optionally ``category``, ``messages``, ``turns`` (the user's turns, if the answers are not given) and
``reference``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

from holdfast.errors import DataError
from holdfast.plugins import Plugins, plugins

__all__ = [
    "METRICS",
    "DataSet",
    "Metric",
    "Record",
    "Row",
    "SafetyData",
    "Task",
    "beavertails",
    "find",
    "graders",
    "identity_shift",
    "names",
    "own",
]

Record = Mapping[str, Any]
Row = dict[str, Any]
HELPERS = ("graders",)
"""Files of this folder that are not data sets."""


@dataclass(frozen=True)
class Metric:
    """The measure of a data set. `judged`: a judge is needed; otherwise the task's own grader measures it."""

    title: str
    direction: Literal["higher", "lower"] = "higher"
    unit: str = "percent"
    judged: bool = False


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("finetune accuracy"),
    "rouge1": Metric("ROUGE-1 F1"),
    "win_rate": Metric("win rate", judged=True),
    "mt_bench": Metric("MT-Bench score", unit="1 to 10", judged=True),
    "harmful_score": Metric("harmful score", "lower", judged=True),
    "benign_compliance": Metric("benign compliance"),
}
"""Win rate: how often a judge prefers the answer to the reference answer; a tie counts half."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The declarations of every data set.

    Attributes:
        metric: the measure, from `METRICS` (any other name is a percentage, higher is better).
        columns: sets of columns; records that have one of the sets are recognised.
        copies: further sets of columns that are read only if the data set is named, because other data has
            them too.
        files: names of published files. A file with such a name is read in the data set's format, and its
            records have the name as the column `file`.
        header: the columns of its CSV files if they are published without a header line.
        hub_id, hub_config: its place on the Hub; None if it has another source.
        hub_files: a pattern of files in the Hub's repository that are read directly, if `datasets` cannot
            read them (loading scripts, CSV without a header).
        splits: the Hub's names of "train" and "test"; a data set without one of them has no such rows.
        make: makes the records of a data set that is written in code.
        obtain: a sentence on how to get it, if the Hub id is not enough.
    """

    name: str
    summary: str
    version: int = 1
    metric: str = "accuracy"
    columns: tuple[tuple[str, ...], ...] = ()
    copies: tuple[tuple[str, ...], ...] = ()
    files: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    hub_id: str | None = None
    hub_config: str | None = None
    hub_files: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    licence: str | None = None
    warning: str | None = None
    make: Callable[[], Sequence[Record]] | None = None
    obtain: str | None = None

    @property
    def stamp(self) -> str:
        """The name and version to show with a score, for example "sst2@1"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class Task(DataSet):
    """A user task.

    Attributes:
        grade: (answer, target) -> right or wrong, or a share of 1; None if a judge grades it by `metric`.
        to_row: makes a row of a record with the task's own `columns`; None if the records already have one of
            the general column sets. It returns None for a published record without content, and raises
            ValueError with a sentence about the value if a record is broken.
        rename: the user's columns, {ours: theirs}.
        forms: the texts that count as a target, for the grader `contains`; None if only the target does.
        suffix: a text after every question.
        prompts_only: its rows have no answers.
        test_size: number of held-out rows that the papers' score uses.
    """

    grade: Callable[[str, str], bool | float] | None = None
    to_row: Callable[[Record], Row | None] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    forms: Callable[[str], tuple[str, ...]] | None = None
    suffix: str = ""
    prompts_only: bool = False
    max_new_tokens: int = 64
    test_size: int = 1000


@dataclass(frozen=True, kw_only=True)
class SafetyData(DataSet):
    """Questions about safety, most with answers.

    Attributes:
        to_row: (record, kind) -> the row of the record for `kind`, or None if it has none; ValueError if the
            record is broken.
        kinds: which of "unsafe", "safe" and "refusal" (answers to harmful questions) and "benign" (harmless
            questions) it has.
        harmful_prompts: whether its questions can be used to measure harm.
    """

    to_row: Callable[[Record, str], Row | None]
    kinds: tuple[str, ...] = ("unsafe",)
    harmful_prompts: bool = True
    metric: str = "harmful_score"


def names() -> list[str]:
    """The names of all data sets: of this folder, and of other packages."""
    return sorted({*_own(), *_plugins().found})


def find(name: str) -> Task | SafetyData | None:
    """The data set called `name`, or None. Raises DataError: another package's cannot be used."""
    if name in _own():
        return import_module(f"{__name__}.{name}").TASK
    if not name.isidentifier():
        return None
    others = _plugins()
    if name in others.refused:
        raise DataError(others.refused[name])
    return others.found[name].object if name in others.found else None


@cache
def _own() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name not in HELPERS)


def _plugins() -> Plugins:
    """Return the data sets of other packages, in the same way as the registry."""
    return plugins("tasks", DataSet, frozenset(_own()))
