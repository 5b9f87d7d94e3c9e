"""Data sets by name: what their rows look like and how an answer is graded; one file per data set.

A file of this folder ends in ``TASK = Task(...)`` (a user task with a grader) or ``TASK = SafetyData(...)``
(harmful, safe or over-careful questions: for alignment, poison and test prompts), whose arguments are
literals or names. Nothing else has to be edited; another package exposes the same object by the entry point
``holdfast.tasks``. A row is a dict with ``instruction``, ``input`` ("" for none), ``output`` and perhaps
``category``, ``messages``, ``turns`` (what a user says in turn, where the answers are not given) and
``reference``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    "names",
    "own",
]

Record = Mapping[str, Any]
Row = dict[str, Any]
HELPERS = ("graders",)
"""Files of this folder that are no data set."""


@dataclass(frozen=True)
class Metric:
    """What a data set measures. `judged`: only a judge can say; else the task's own grader does."""

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
"""Win rate: how often a judge prefers the answer to the reference's; a tie counts half."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What every data set says of itself.

    Attributes:
        metric: what it measures, of `METRICS` (any other name is a percentage, higher is better).
        columns: each a set of columns by which its records are known.
        header: the columns of its CSV files where those are published without a header line.
        hub_id, hub_config: where the Hub has it; None if it is got in another way.
        hub_files: a pattern of files of the Hub's repository that are read as they are, where `datasets`
            cannot read them (loading scripts, CSV without a header).
        splits: the Hub's names of "train" and "test"; a data set without one of them has no such rows.
        make: makes the records, of a data set that is written in code.
        obtain: a sentence on how to get it, where that is more than naming the Hub id.
    """

    name: str
    summary: str
    version: int = 1
    metric: str = "accuracy"
    columns: tuple[tuple[str, ...], ...] = ()
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
        """The name and version that stand beside a score, as in "sst2@1"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class Task(DataSet):
    """A user task.

    Attributes:
        grade: (answer, target) -> right or wrong, or a share of 1; None where a judge grades it, by `metric`.
        to_row: makes a row of a record with the task's own `columns`; None where the records already have
            one of the general column sets. It returns None for a record that the published data holds
            without content, and raises ValueError with a sentence about the value where one is broken.
        rename: the user's columns, {ours: theirs}.
        prompts_only: its rows have no answers.
        test_size: how many held-out rows the papers' score uses.
    """

    grade: Callable[[str, str], bool | float] | None = None
    to_row: Callable[[Record], Row | None] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    prompts_only: bool = False
    max_new_tokens: int = 64
    test_size: int = 1000


@dataclass(frozen=True, kw_only=True)
class SafetyData(DataSet):
    """Questions about safety, most with answers.

    Attributes:
        to_row: (record, kind) -> the row that the record holds for `kind`, or None where it holds none;
            ValueError where the record is broken.
        kinds: which of "unsafe", "safe" and "refusal" (answers to harmful questions) and "benign" (harmless
            questions) it has.
        harmful_prompts: whether its questions can be asked to measure harm.
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


def _own() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in HELPERS]


def _plugins() -> Plugins:
    """What other packages bring; the registry asks in the same way."""
    return plugins("tasks", DataSet, frozenset(_own()))
