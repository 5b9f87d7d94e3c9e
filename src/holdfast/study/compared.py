"""A published table beside the measured numbers: which runs measure which cell, and how they differ.

A run measures a cell if its methods and their parameters, its task, and every key that the table varies are
those of the cell. Other settings (the model, the number of test prompts, training arguments) may differ; the
table lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.recipe import Recipe
from holdfast.reporting.collect import DESCRIBED, Run, beside_runs, load, results_file
from holdfast.reporting.grouped import Mean, mean, mean_of
from holdfast.reporting.read import mapping, number
from holdfast.reporting.text import plain
from holdfast.study import tables
from holdfast.study.grid import expand
from holdfast.study.published import Published

STAGES = ("alignment", "user", "post_hoc")
ALWAYS = (
    "data.task", "data.poison_ratio", "data.filter", "data.attack", "attack_sweep", "post_hoc_attack",
)  # fmt: skip
"""Keys that must always agree, besides the methods, their parameters, and the keys that the table varies."""

IGNORED = ("name", "seed", "protocol", "evaluation.batch_tokens")
NO_METHOD = ("training", "lora", "adapter", "base")
"""Keys of a stage that are not parameters of its method."""

SEVERAL = "the paper's models"
"""The name of the models of a table that compares models."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        published: the published number, or None if it is not known.
        measured: the mean over seeds, or None.
        why: why it was not measured; "" if it was.
        stamp: the position of its protocol stamp in `Compared.stamps`, or None.
    """

    row: str
    column: str
    metric: str
    published: float | None
    measured: Mean | None
    why: str = ""
    stamp: int | None = None

    @property
    def difference(self) -> float | None:
        """Measured minus published, if both are known."""
        if self.measured is None or self.published is None:
            return None
        return self.measured.value - self.published


@dataclass(frozen=True)
class Compared:
    """A published table, its cells with what was measured, and the notes below it.

    Attributes:
        model: "world", "smollm2", the path of the measured model, or None if nothing was measured.
        stamps: the protocol stamps of the measured cells, each once.
        changes: settings in which runs differ from the table's grid, with their values and the grid's.
    """

    table: Published
    model: str | None
    cells: tuple[Cell, ...]
    stamps: tuple[Values, ...] = ()
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def runs_in(folders: Sequence[str | Path]) -> list[Run]:
    """Return the complete runs in folders: runs themselves, or the folders of sweeps.

    Raises:
        InputError: a folder holds no run.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        inside = [folder] if results_file(folder).is_file() else []
        if not inside and folder.is_dir():
            inside = [one for one in sorted(folder.iterdir()) if (one / "results.json").is_file()]
            inside = [one for one in inside if not beside_runs(one)]
        if not inside:
            raise InputError(f"Expected runs (folders with results.json), found none: {folder}.")
        found |= {results_file(one).resolve(): load(one) for one in inside}
    return list(found.values())


def compare(of: Published, runs: Sequence[Run], model: str | None = None) -> Compared:
    """Find the runs of each cell of a table.

    Args:
        of: the table.
        runs: the runs to look at; runs that measure no cell are ignored.
        model: "world", "smollm2" or a path; by default the model of the runs.

    Raises:
        InputError: runs of several models measure the same cells.
    """
    found: dict[str, Compared] = {}
    for path, own in _by_model(of, runs).items():
        if model in (None, path):
            one = _compared(of, own, path)
            if any(cell.measured for cell in one.cells):
                found[path] = one
    if len(found) > 1:
        raise InputError(f"The runs are of several models: {', '.join(found)}. Choose one with --model.")
    return next(iter(found.values())) if found else _compared(of, [], model)


def _by_model(of: Published, runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by model; all large models together if the table compares models."""
    varied = {key for one in tables.cells(of) for key in one.settings}
    found: dict[str, list[Run]] = {}
    for run in runs:
        path = str(mapping(run.recipe.get("model")).get("path"))
        place = path if path in tables.SMALL or "model.path" not in varied else SEVERAL
        found.setdefault(place, []).append(run)
    return found


def _compared(of: Published, runs: Sequence[Run], model: str | None) -> Compared:
    variant = model if model in tables.SMALL else None
    planned = tables.cells(of, variant) if tables.base(of, variant) is not None else []
    cells: list[Cell] = []
    stamps: list[Values] = []
    changes: dict[str, None] = {}
    possible = {(one.row, one.column) for one in planned}
    left = 0
    recipes = {} if not runs or not planned else {
        run.folder: run.recipe for run in expand(tables.grid(of.name, variant))
    }  # fmt: skip
    by_name = {recipe.name: recipe for recipe in recipes.values()}
    hard = _hard(planned)
    measured: dict[tuple[str, str], tuple[list[Run], bool]] = {}
    for one in planned if runs else ():
        chosen, differing, others = _of_cell(by_name[one.run], runs, hard, one.settings)
        left += others
        if chosen:
            measured[one.row, one.column] = chosen, one.start
            changes |= dict.fromkeys(differing)
    for row in of.numbers:
        for metric in of.numbers[row]:
            line: list[Cell] = []
            for column in of.columns:
                published = of.value(row, column, metric)
                if column == of.mean:
                    line.append(Cell(row, column, metric, published, *_average(line)))
                    continue
                if (row, column) not in measured:
                    why = "not measured" if (row, column) in possible else "no run"
                    line.append(Cell(row, column, metric, published, None, why))
                    continue
                of_cell, start = measured[row, column]
                value = _value([_row(run, start) for run in of_cell], metric)
                stamp = _stamp(of_cell[0], stamps)
                line.append(
                    Cell(row, column, metric, published, value, "" if value else "not measured", stamp)
                )
            cells += line
    notes = list(of.notes)
    if left:
        text = "1 run measures" if left == 1 else f"{left} runs measure"
        notes.append(f"{text} a cell with more changed settings than the runs shown, and is left out.")
    return Compared(of, model, tuple(cells), tuple(stamps), tuple(changes), tuple(notes))


def _of_cell(
    recipe: Recipe, runs: Sequence[Run], hard: set[str], settings: Mapping[str, Any]
) -> tuple[list[Run], list[str], int]:
    """Return the runs of a cell over seeds, the settings that differ, and how many other runs match too."""
    wanted = _flat(recipe)
    groups: dict[tuple[str, ...], dict[int | None, Run]] = {}
    count = 0
    for run in runs:
        mine = _flat(run.recipe)
        keys = [key for key in dict.fromkeys([*wanted, *mine]) if wanted.get(key) != mine.get(key)]
        keys = [key for key in keys if not _within(key, IGNORED)]
        if any(_within(key, hard) or _of_method(key) for key in keys):
            continue
        told = tuple(f"{key}: {plain(mine.get(key))} instead of {plain(wanted.get(key))}" for key in keys)
        groups.setdefault(told, {}).setdefault(run.recipe.get("seed"), run)
        count += 1
    if not groups:
        return [], [], 0
    told = min(groups, key=lambda one: (len(one), -len(groups[one])))
    chosen = groups[told]
    return [chosen[seed] for seed in sorted(chosen, key=lambda s: s or 0)], list(told), count - len(chosen)


def _hard(planned: Sequence[tables.Planned]) -> set[str]:
    """The keys that must agree."""
    return {*ALWAYS, *(key for one in planned for key in one.settings if key not in STAGES)}


def _within(key: str, blocks: Any) -> bool:
    """Whether a key is one of `blocks`, or inside one of them."""
    return any(key == block or key.startswith(f"{block}.") for block in blocks)


def _of_method(key: str) -> bool:
    stage, _, rest = key.partition(".")
    return stage in STAGES and rest.partition(".")[0] not in NO_METHOD


def _flat(recipe: Recipe | Mapping[str, Any]) -> Values:
    """The keys of a recipe with the defaults of its methods; None and an empty block are left out."""
    if isinstance(recipe, Recipe):
        return dict(_leaves(recipe.whole()))
    try:
        return dict(_leaves(Recipe.model_validate(recipe).whole()))
    except ValueError:  # a method of another package or version
        return dict(_leaves(recipe))


def _leaves(value: Mapping[str, Any], place: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, part in value.items():
        here = f"{place}.{key}" if place else str(key)
        if isinstance(part, Mapping):
            found += _leaves(part, here)
        elif part is not None and part not in ([], {}):
            found.append((here, float(part) if type(part) is int else part))
    return found


def _row(run: Run, start: bool) -> Values:
    """The row of a run's final model, or of the model before fine-tuning."""
    rows = [row for row in run.rows if (row.get("user") is None and row.get("post_hoc") is None) == start]
    aligned = [row for row in rows if row.get("alignment") is not None]
    return (aligned or rows or [{}])[-1] if start else (rows or [{}])[-1]


def _stamp(run: Run, stamps: list[Values]) -> int:
    stamp = {key: value for key, value in run.protocol.items() if key not in DESCRIBED}
    if stamp not in stamps:
        stamps.append(stamp)
    return stamps.index(stamp)


def _value(rows: Sequence[Values], metric: str) -> Mean | None:
    """The metric of a cell over seeds."""
    if metric not in DERIVED:
        return mean_of(rows, metric)
    values = [value for row in rows if (value := number(DERIVED[metric](row))) is not None]
    if len(values) > 1:
        return mean(values)
    return Mean(values[0], None, None, (values[0],)) if values else None


def _cost(stage: str, key: str, divided_by: float) -> Callable[[Values], float | None]:
    def value(row: Values) -> float | None:
        found = number(mapping(mapping(row.get("cost")).get(stage)).get(key))
        return None if found is None else found / divided_by

    return value


def _task_score(metric: str) -> Callable[[Values], float | None]:
    """The score on the user's task if it is this metric: the world's task has an accuracy instead."""
    return lambda row: row.get("task_score") if row.get("task_metric") == metric else None


def _harmfulness(row: Values) -> float | None:
    """The mean score of the judge that rates from 1 to 5."""
    return number(mapping(mapping(row.get("judges")).get("openai")).get("mean_score"))


DERIVED: dict[str, Callable[[Values], float | None]] = {
    "harmfulness": _harmfulness,
    "mt_bench": _task_score("mt_bench"),
    "rouge1": _task_score("rouge1"),
    "seconds_per_1000_steps": _cost("user", "seconds_per_1000_steps", 1),
    "peak_memory_gb": _cost("user", "peak_memory_bytes", 1e9),
    "alignment_seconds_per_step": _cost("alignment", "seconds_per_1000_steps", 1000),
    "alignment_memory_gb": _cost("alignment", "peak_memory_bytes", 1e9),
}
"""Metrics that are not a key of a row, as functions of the row."""


def _average(line: Sequence[Cell]) -> tuple[Mean | None, str]:
    """The mean over the columns of a row, if all of them were measured with the same number of seeds."""
    found = [cell.measured for cell in line if cell.measured is not None]
    if len(found) < len(line) or len({one.seeds for one in found}) != 1:
        return None, "not measured" if any(cell.why == "not measured" for cell in line) or found else "no run"
    by_seed = [sum(values) / len(values) for values in zip(*(one.by_seed for one in found), strict=True)]
    if len(by_seed) > 1:
        return mean(by_seed), ""
    errors = [one.stderr for one in found]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(known) if len(known) == len(errors) else None
    return Mean(by_seed[0], error, None, tuple(by_seed)), ""
