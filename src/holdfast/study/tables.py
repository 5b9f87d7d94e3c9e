"""The runs that measure a published table, as a grid for `holdfast sweep`.

The block `grid` of a table has `recipe` (the keys of all runs), `rows` and `columns` (by name, the keys of
that row or column). Keys may have dots. An entry that is null is not measured. The key `take: start` of an
entry takes the model before fine-tuning instead of the final one.

The same table on a small model: `world` and `smollm2` in the block replace `recipe`, and in an entry they
replace its keys; `small` stands for both. A column that has none keeps its keys. `without` lists, by small
model, the cells (row, column) that cannot be measured on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import RecipeError
from holdfast.study.published import Published, table

SMALL = ("world", "smollm2")
"""Models that have their own settings in the tables."""

DEFAULTS = {
    "world": {"protocol": "world", "data.task": "world"},
    "smollm2": {"protocol": "smollm2", "data.task": "sst2"},
}
"""The keys of all runs on a small model, unless the table gives others."""

WORDS = {*SMALL, "small", "take"}
"""Keys of an entry that are not keys of a recipe."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A cell that can be measured.

    Attributes:
        run: the name of its run.
        settings: the keys of that run, without those of the table's `recipe`.
        start: whether the cell is the model before fine-tuning.
    """

    row: str
    column: str
    run: str
    settings: Settings
    start: bool


def cells(of: Published, model: str | None = None) -> list[Planned]:
    """Return the cells of a table that a run measures on `model`: "world", "smollm2", or any other (None)."""
    found = []
    without = [tuple(map(str, cell)) for cell in of.grid.get("without", {}).get(model, ())]
    for row, given in of.grid.get("rows", {}).items():
        for column, own in of.grid.get("columns", {}).items():
            parts = [_chosen(given, model), _chosen(own, model)]
            if None in parts or (str(row), str(column)) in without:
                continue
            settings = {k: v for part in parts for k, v in (part or {}).items() if k not in WORDS}
            takes = [entry.get("take") for entry in (given, own) if isinstance(entry, Mapping)]
            alone = not any(key not in WORDS for key in parts[1] or {})
            run = _word(row if alone else f"{row} {column}")
            found.append(Planned(str(row), str(column), run, settings, "start" in takes))
    return found


def base(of: Published, model: str | None = None) -> Settings | None:
    """Return the keys of all runs of a table on `model`; None if the table has none for it."""
    if model in SMALL:
        for key in (str(model), "small"):
            if key in of.grid:
                return of.grid[key]
        return DEFAULTS[str(model)]
    return of.grid.get("recipe")


def grid(name: str, model: str | None = None, seeds: int = 1) -> Settings:
    """Return the grid of a published table, a mapping for `expand`.

    Args:
        name: the table's name.
        model: "world", "smollm2", or the path of the model instead of the paper's.
        seeds: the number of seeds, from the protocol's on.

    Raises:
        RecipeError: there is no such table, or its protocol is not known, or not for this model.
    """
    of = table(name)
    if not of.grid:
        raise RecipeError(f"{name} has no grid: its protocol is not known. See: holdfast table {name}")
    keys, planned = base(of, model), cells(of, model)
    if keys is None or not planned:
        raise RecipeError(f"{name} has no runs on {model}. Leave out --model for the paper's own.")
    keys = dict(keys)
    if model is not None and model not in SMALL:
        if any("model.path" in one.settings for one in planned):
            raise RecipeError(f"{name} compares models, so --model cannot name one: {model}.")
        keys["model.path"] = model
    include = {}
    for one in planned:
        entry = {"name": one.run, **{k: _one(v) for k, v in one.settings.items()}}
        include[one.run] = {**entry, "seed": list(range(42, 42 + seeds))} if seeds > 1 else entry
    return {**nested(keys), "include": list(include.values())}


def nested(keys: Mapping[str, Any]) -> Settings:
    """Return keys with dots as blocks in blocks."""
    whole: Settings = {}
    for key, value in keys.items():
        place, parts = whole, key.split(".")
        for part in parts[:-1]:
            below = place.get(part)
            if not isinstance(below, dict):
                place[part] = below = {}
            place = below
        place[parts[-1]] = dict(value) if isinstance(value, Mapping) else value
    return whole


def _chosen(entry: Any, model: str | None) -> Settings | None:
    """Return the keys of a row or column on a model; None if it has no run there."""
    if entry is None:
        return None
    for key in (model, "small") if model in SMALL else ():
        if key in entry:
            return entry[key]
    return entry


def _one(value: Any) -> Any:
    """Return a value as the only one of an axis: a list would be several."""
    return [value] if isinstance(value, list) else value


def _word(text: str) -> str:
    """Return a name for a run."""
    return re.sub(r"[^A-Za-z0-9._+-]+", " ", text.replace("/", "-")).strip()
