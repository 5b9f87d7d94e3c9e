"""Grids: a recipe with lists, expanded to one recipe for each combination of their values.

A grid is a recipe with the keys `grid`, `exclude`, `include` and `launcher`. A list is one axis; a mapping in
a list may have lists as values, which are axes of that entry only. A value that is itself a list is written
as a list in the list.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError
from holdfast.machine.store import identity_hash
from holdfast.recipe import Recipe, layers
from holdfast.recipe.reading import BARE, Layer, shorten
from holdfast.study import packaged, resources

KEYS = ("grid", "exclude", "include", "launcher")
MOST = 10_000
"""The largest number of runs in a grid."""

OWN = ("steps", "sweep")
"""Folders of a sweep that are not runs."""

Point = dict[str, tuple[Any, str]]
"""The choices of one run: by recipe key, the value and its words in the name."""


@dataclass(frozen=True)
class Run:
    """One recipe of a grid, and the name of its folder."""

    folder: str
    recipe: Recipe


def is_grid(source: str | Path | Mapping[str, Any]) -> bool:
    """Whether a recipe has lists to expand."""
    return any("grid" in one.raw or "include" in one.raw for one in layers.layers(packaged.find(source)))


def expand(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> list[Run]:
    """Return the runs of a grid in order: the last axis changes fastest.

    Args:
        source: a file, the name of a packaged grid or recipe, or a mapping.
        overrides: "key=value", for every run.

    Raises:
        RecipeError: the grid or one of its recipes is not valid.
    """
    source = packaged.find(source)
    files = layers.layers(source)
    name = files[0].name
    given = {key: _taken(files, key) for key in KEYS}
    points = list(_points(_mapping(given["grid"], f"{name}: grid", {}))) if given["grid"] else []
    for number, pattern in enumerate(_list(given["exclude"], f"{name}: exclude")):
        where = f"{name}: exclude, entry {number + 1}"
        left = [point for point in points if not _matches(point, _mapping(pattern, where))]
        if len(left) == len(points):
            raise RecipeError(f"{where}: no run of the grid has {shorten(pattern)}.")
        points = left
    for number, extra in enumerate(_list(given["include"], f"{name}: include")):
        points += _points(_mapping(extra, f"{name}: include, entry {number + 1}"))
    if not points and not any(given.values()):
        one = f"It is one run: holdfast run {name}" if not isinstance(source, Mapping) else "It is one run"
        raise RecipeError(f"{name} has no block grid: {{KEY: [VALUE, ...]}}. {one}.")
    if not points:
        raise RecipeError(f"{name}: no run is left. Expected grid: {{KEY: [VALUE, ...]}}.")
    if len(points) > MOST:
        raise RecipeError(f"{name}: {len(points):,} runs; at most {MOST:,} are possible.")
    overrides = [text for text in overrides if not text.startswith("launcher.")]
    stem = None if isinstance(source, Mapping) else Path(source).stem
    found: dict[str, Run] = {}
    for point in points:
        run = _run(files, stem, overrides, point)
        if run.folder in found:
            told = ", ".join(f"{key}={shorten(value)}" for key, (value, _) in point.items())
            raise RecipeError(f"{name}: two runs have the same name {run.folder}: {told}. Remove one.")
        found[run.folder] = run
    return list(found.values())


def launcher(
    source: str | Path | Mapping[str, Any], name: str | None = None, overrides: Sequence[str] = ()
) -> resources.Launcher:
    """Return the block `launcher` of a grid.

    Args:
        source: as for `expand`.
        name: the launcher to use instead of the one that the block names.
        overrides: "key=value"; those with a key such as `launcher.partition` change the block.

    Raises:
        RecipeError: the block is not valid.
    """
    files = layers.layers(packaged.find(source))
    found = [layer for layer in files if "launcher" in layer.raw]
    given = layers.overridden({}, [text for text in overrides if text.startswith("launcher.")], ())
    changed = given.get("launcher", {})
    return resources.read(found[0].raw["launcher"] if found else None, found or files, name, changed)


def _taken(files: Sequence[Layer], key: str) -> Any:
    """Remove a key from every file, and return the value of the first file that has it."""
    values = [layer.raw.pop(key) for layer in files if key in layer.raw]
    return values[0] if values else None


def _mapping(value: Any, where: str, otherwise: Any = None) -> Mapping[str, Any]:
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(f"{where}: expected recipe keys with lists of values, found {shorten(value)}.")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecipeError(f"{where}: expected a list of mappings, found {shorten(value)}.")
    return value


def _points(axes: Mapping[str, Any]) -> Iterator[Point]:
    """Yield every combination of the values."""
    choices = []
    for key, value in axes.items():
        values = value if isinstance(value, list) else [value]
        if not values:
            raise RecipeError(f"grid: {key} is an empty list; expected at least one value.")
        choices.append([one for entry in values for one in _choices(key, entry)])
    for combination in itertools.product(*choices):
        yield dict(zip(axes, combination, strict=True))


def _choices(key: str, value: Any) -> Iterator[tuple[Any, str]]:
    """Yield a value with its words; a mapping with lists yields one for each combination of them."""
    if not isinstance(value, Mapping):
        yield value, _word(value)
        return
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    bare = BARE.get(key)
    for combination in itertools.product(*lists.values()):
        chosen = {**value, **dict(zip(lists, combination, strict=True))}
        first = [_word(chosen[bare])] if bare in chosen else []
        yield chosen, " ".join([*first, *(f"{name} {_word(chosen[name])}" for name in lists if name != bare)])


def _word(value: Any) -> str:
    """Return a value for a name: the last part of a path, and only characters that a name may have."""
    if value is None:
        return "none"
    text = Path(value).name or value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or identity_hash(value)


def _matches(point: Point, pattern: Mapping[str, Any]) -> bool:
    """Whether a point has, for every key of the pattern, one of its values."""
    whole: dict[str, Any] = {}
    for key, (value, _) in point.items():
        _put(whole, key.split("."), layers.spelt_out(value, key.split(".")))
    for key, wanted in pattern.items():
        one_of = wanted if isinstance(wanted, list) else [wanted]
        if not any(_equal(_at(whole, key.split(".")), layers.spelt_out(v, key.split("."))) for v in one_of):
            return False
    return True


def _put(whole: dict[str, Any], place: Sequence[str], value: Any) -> None:
    for part in place[:-1]:
        below = whole.setdefault(part, {})
        whole = below if isinstance(below, dict) else whole
    whole[place[-1]] = {**value} if isinstance(value, Mapping) else value


def _at(whole: Any, place: Sequence[str]) -> Any:
    for part in place:
        whole = whole.get(part, _Missing) if isinstance(whole, Mapping) else _Missing
    return whole


class _Missing:
    """The value of a key that a point does not choose."""


def _equal(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one; of a mapping, whether it has all wanted keys."""
    if isinstance(wanted, Mapping):
        return isinstance(value, Mapping) and all(
            _equal(value.get(k, _Missing), v) for k, v in wanted.items()
        )
    return type(value) is not type and bool(value == wanted)


def _run(files: Sequence[Layer], stem: str | None, overrides: Sequence[str], point: Point) -> Run:
    """Return the run of a point. Its seed is part of the folder only: the report takes means over seeds."""
    chosen = [f"{key}={json.dumps(value)}" for key, (value, _) in point.items()]
    own = [replace(layer, raw=deepcopy(layer.raw)) for layer in files]
    recipe = Recipe.of_layers(own, stem, [*overrides, *chosen])
    words = " ".join(
        word if key in BARE or key in ("protocol", "data.task") else f"{key.rpartition('.')[2]} {word}"
        for key, (_, word) in point.items()
        if key not in ("seed", "name")
    )
    if words and "name" not in point:
        if len(words) > 80:
            words = f"{words[:67]} {identity_hash(words)}"
        recipe = recipe.named(words)
    folder = f"{recipe.name} seed {recipe.seed}" if "seed" in point else recipe.name
    folder = folder.replace(" ", "-")
    return Run(f"{folder}-run" if folder in OWN else folder, recipe)
