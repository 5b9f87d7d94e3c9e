"""Data sets by name: what their rows look like and how an answer is graded; one file per data set.

A file of this folder ends in ``TASK = Task(...)`` (a user task with a grader) or ``TASK = SafetyData(...)``
(harmful and safe answers, for alignment, poison and test prompts). Nothing else has to be edited.
A row is a dict with ``instruction``, ``input`` ("" for none), ``output`` and perhaps ``category``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

Record = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A user task. `to_row` makes a row of a record with the task's own `columns`.

    `to_row` is None where the records already have one of the general column sets. It raises
    ValueError with a sentence about the value when a record cannot be a row. `grade` says whether a
    generated answer is right; `test_size` is how many held-out rows the papers' score uses.
    """

    name: str
    summary: str
    grade: Callable[[str, str], bool]
    version: int = 1
    to_row: Callable[[Record], Row] | None = None
    columns: tuple[tuple[str, ...], ...] = ()
    hub_id: str | None = None
    hub_config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    licence: str | None = None
    max_new_tokens: int = 64
    test_size: int = 1000

    @property
    def stamp(self) -> str:
        """The name and version that stand beside a score, as in "sst2@1"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class SafetyData:
    """Prompts with harmful and harmless answers.

    `to_row(record, kind)` returns the row that the record holds for `kind` ("unsafe", "safe" or
    "refusal"), or None where it holds none; ValueError where the record is broken.
    """

    name: str
    summary: str
    to_row: Callable[[Record, str], Row | None]
    version: int = 1
    columns: tuple[tuple[str, ...], ...] = ()
    hub_id: str | None = None
    hub_config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    licence: str | None = None
    warning: str | None = None


def names() -> list[str]:
    """The names of all data sets of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Task | SafetyData | None:
    """The data set called `name`, or None."""
    return import_module(f"{__name__}.{name}").TASK if name in names() else None
