"""Recipe files: find and read them, merge what they extend, apply `key=value` overrides, and explain errors
with key, file and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from holdfast.errors import RecipeError, nearest
from holdfast.recipe import packaged
from holdfast.recipe.model import wording
from holdfast.recipe.reading import BARE, Layer, parse, read, shorten

STAGES = ("alignment", "user", "post_hoc")

ATTACKS = (("data", "attack"), ("post_hoc_attack",))

FILTER = ("data", "filter")
FILTERS = ("judge", "score")
"""The keys that name what filters rows."""

BLOCKS = (
    ("data", {"filter": "judge", "attack": "name"}),
    ("evaluation", {"rater": "name", "judges": "name"}),
)
"""The blocks outside stages that may name a user's own file, and by entry the key that names it."""


def layers(source: str | Path | Mapping[str, Any]) -> list[Layer]:
    """Read the recipe, the file that it extends, the file that this one extends, and so on.

    Raises:
        RecipeError: a file is missing or is not a recipe, or the files extend each other in a circle.
    """
    if isinstance(source, Mapping):
        found, seen = [Layer("recipe", Path(), dict(source), None)], []
    else:
        found, key = _load(str(source))
        seen = [key]
    while (base := found[-1].raw.pop("extends", None)) is not None:
        last = found[-1]
        line = last.holds(["extends"])[1]
        where = f"{last.name}, line {line}: extends" if line else f"{last.name}: extends"
        if not isinstance(base, str):
            text = f"expected a path or the name of a packaged recipe, found {shorten(base)}"
            raise RecipeError(f"{where}: {text}.")
        beside = last.folder / base
        looks_local = _is(beside.is_file) or beside.suffix in (".yaml", ".yml") or "/" in base
        try:
            more, key = _load(str(beside) if looks_local else base)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        if key in seen:
            chain = " extends ".join(layer.name for layer in [*found, more[0]])
            raise RecipeError(f"{where}: the files extend each other in a circle: {chain}.")
        found += more
        seen.append(key)
    return found


def merged(files: Sequence[Layer], stage_keys: Container[str], stem: str | None) -> dict[str, Any]:
    """Override the keys of the last file with those of each file before it, block by block.

    If a file changes a stage's defense, the parameters of the other defense are dropped. The name is not
    inherited, because the run's folder is named after it.

    Args:
        stage_keys: keys of a stage that are not parameters of its defense.
        stem: the name of the recipe if the first file gives none.
    """
    raw: dict[str, Any] = {}
    for layer in reversed(files):
        if raw:
            raw.pop("name", None)
        raw = on_top(raw, layer.raw, (), stage_keys)
    if len(files) > 1 and stem is not None:
        raw.setdefault("name", stem)
    return raw


def on_top(
    base: Mapping[str, Any], own: Mapping[str, Any], place: tuple[str, ...], stage_keys: Container[str]
) -> dict[str, Any]:
    """Override the keys of `base` with `own`, block by block, at the place of both in a recipe."""
    result = dict(base)
    for key, value in own.items():
        here = (*place, key)
        below, above = spelt_out(base.get(key), here), spelt_out(value, here)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            if here[0] in STAGES and not place and _defense(above, below) != _defense(below, {}):
                below = {k: v for k, v in below.items() if k in stage_keys}
            if here in ATTACKS and above.get("name", below.get("name")) != below.get("name"):
                below = {}  # another attack has other parameters
            if here == FILTER and any(above.get(key, below.get(key)) != below.get(key) for key in FILTERS):
                below = {}  # another judge or score has other keys
            result[key] = on_top(below, above, here, stage_keys)
        else:
            result[key] = value
    return result


def _defense(stage: Mapping[str, Any], below: Mapping[str, Any]) -> Any:
    return stage.get("defense", below.get("defense", "sft"))


def spelt_out(value: Any, place: Sequence[str]) -> Any:
    """Return a bare path or name as a block, and any other value unchanged."""
    bare = BARE.get(".".join(place))
    return {bare: value} if bare and isinstance(value, str) and value != "none" else value


def stops(stage: Any) -> bool:
    """Whether a recipe's value of a stage says that the stage does not run."""
    return stage is None or stage == "none"


def _load(name: str) -> tuple[list[Layer], Path | str]:
    """Return the layers of a path or a packaged recipe, and a value that identifies the recipe."""
    path = Path(name)
    if _is(path.is_file):
        raw, node = read(path)
        return [Layer(name, path.parent, raw, node)], path.resolve()
    known = packaged.recipes()
    if name in known:
        return packaged.layers(known[name]), name
    if _is(path.exists):
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise RecipeError(f"Expected a recipe file, found {kind}: {name}.")
    hint = nearest(name, known)
    hint = " holdfast list recipes shows the packaged ones." if "Known:" in hint else hint
    raise RecipeError(f"No such recipe file: {name[:200]}.{hint}")


def _is(asks: Callable[[], bool]) -> bool:
    """Return what a method of a path answers; False for a name that cannot be a path."""
    try:
        return asks()
    except (OSError, ValueError):
        return False


def overridden(raw: Mapping[str, Any], asked: Sequence[str], stage_keys: Container[str]) -> dict[str, Any]:
    """`raw` overridden by `a.b.c=value` (the value is YAML), like the keys of a file that extends it."""
    return on_top(raw, _overrides(asked), (), stage_keys)


def _overrides(asked: Sequence[str]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for override in asked:
        _set(own, override)
    return own


def _set(raw: dict[str, Any], asked: str) -> None:
    key, equals, text = asked.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"Expected key=value, found '{asked}'. For example: user.rho=3")
    value, _ = parse(text, shorten(asked))
    *parents, last = key.strip().split(".")
    place = raw
    for depth, parent in enumerate(parents):
        below = spelt_out(place.get(parent), parents[: depth + 1])
        place[parent] = dict(below) if isinstance(below, Mapping) else {}
        place = place[parent]
    # A bare name and a key of the same block, in either order, are combined into one block.
    here = [*parents, last]
    old, new = spelt_out(place.get(last), here), spelt_out(value, here)
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    place[last] = {**old, **new} if both else value


def origin(files: Sequence[Layer], place: Sequence[str]) -> Layer:
    """Return the file that sets `place`: the first of the files that contain most of its keys."""
    return max(files, key=lambda layer: layer.holds(place)[0])


def own_files(raw: Mapping[str, Any], files: Sequence[Layer]) -> dict[str, Any]:
    """Return a recipe in which methods and judges of the user's own are files that exist.

    A Python file is looked up first from the working folder, then from the folder of its recipe file.
    """

    def found(value: Any, key: str, place: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {**value, key: found(value[key], "", place)} if key in value else value
        if not isinstance(value, str) or not value.endswith(".py") or _is(Path(value).is_file):
            return value
        beside = origin(files, place).folder / value
        return str(beside.resolve()) if _is(beside.is_file) else value

    result = dict(raw)
    for stage, name in (*((stage, "defense") for stage in STAGES), ("post_hoc_attack", "name")):
        if stage in result:
            result[stage] = found(result[stage], name, (stage, name))
    for block, keys in BLOCKS:
        given = result.get(block)
        if not isinstance(given, Mapping):
            continue
        for name in keys.keys() & given.keys():
            value, key, place = given[name], keys[name], (block, name)
            several = isinstance(value, list)
            made = [found(one, key, place) for one in value] if several else found(value, key, place)
            given = {**given, name: made}
        result[block] = given
    return result


def finite(value: Any, place: tuple[str, ...], files: Sequence[Layer]) -> None:
    """Raise RecipeError if a recipe has a number that is not finite, or a text that no file can hold.

    The message names its key. A text with half a surrogate pair has no UTF-8 form.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            finite(part, (*place, str(key)), files)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            finite(part, (*place, str(index)), files)
    elif isinstance(value, float) and not math.isfinite(value):
        _refuse(place, files, f"expected a finite number, found {value}")
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        _refuse(place, files, "expected a text, found half of a surrogate pair in it")


def _refuse(place: tuple[str, ...], files: Sequence[Layer], found: str) -> None:
    """Raise RecipeError with the file, line and key of a value."""
    where, text = Origin(files).line(place), f"{'.'.join(place)}: {found}"
    raise RecipeError(f"{where}: {text}." if where else f"{text}.")


class Origin:
    """The files of a recipe, for messages. Any two are equal, so that equal recipes are."""

    def __init__(self, files: Sequence[Layer] = ()):
        self.files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0

    def line(self, key: Sequence[str]) -> str:
        """Return the file and line of a key, or of the block that would hold it; "" if there is none."""
        if not key or not self.files:
            return ""
        layer = origin(self.files, key)
        line = layer.holds(key)[1]
        return f"{layer.name}, line {line}" if line else ""


def explain(
    error: ValidationError, files: Sequence[Layer], root: type[BaseModel], asked: Sequence[str] = ()
) -> str:
    """Return the messages of a validation error, one line each; `asked` holds the overrides of the files."""
    messages, own = [], _overrides(asked)
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        place = [str(part) for part in problem["loc"]] + getattr(cause, "place", [])
        key = ".".join(place)
        layer = origin(files, place)
        line = layer.holds(place)[1]
        where = f"{layer.name}, line {line}" if line else layer.name
        where = f"{files[0].name}, override" if _sets(own, place) else where
        if problem["type"] == "extra_forbidden":
            text = f"unknown key '{key}'.{nearest(place[-1], _siblings(place, root))}"
        elif problem["type"] == "value_error":
            text = f"{key}: {cause}" if key else str(cause)
        elif problem["type"] == "missing":
            text = f"'{key}' is missing"
        else:
            text = f"{key}: {wording(problem)}"
        messages.append(f"{where}: {text}")
    return "\n".join(messages)


def _sets(own: Any, place: Sequence[str]) -> bool:
    """Whether overrides set the value at a place, or a value in place of a block around it."""
    for key in place:
        if not isinstance(own, Mapping) or key not in own:
            break
        own = own[key]
    return not isinstance(own, Mapping)


def _siblings(place: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Return the known keys of the block that contains an unknown key."""
    block: Any = root
    for key in place[:-1]:
        if key in getattr(block, "model_fields", {}):
            block = _block(block.model_fields[key].annotation)
    return list(getattr(block, "model_fields", {}))


def _block(annotation: Any) -> Any:
    """Return the model class in an annotation such as `list[Annotated[X | None, ...]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_block(part) for part in get_args(annotation))
    return next((block for block in found if block is not None), None)
