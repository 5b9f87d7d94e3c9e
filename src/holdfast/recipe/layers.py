"""Recipe files: find and read them, merge what they extend, apply `key=value` overrides, and explain errors
with key, file and line.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from holdfast import registry
from holdfast.errors import RecipeError, nearest

BARE = {
    "model": "path",
    "data.alignment": "source",
    "data.attack": "name",
    "data.filter": "judge",
    "data.alignment.harmful": "source",
    "alignment": "defense",
    "user": "defense",
    "post_hoc": "defense",
    "evaluation": "protocol",
}
"""The key that a bare string sets, by block."""

STAGES = ("alignment", "user", "post_hoc")


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads 1e-5 as a number, as in YAML 1.2, and not as text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Layer:
    """One file of a recipe: the recipe file itself, or a file that it extends."""

    name: str
    folder: Path
    raw: dict[str, Any]
    node: yaml.Node | None

    def holds(self, place: Sequence[str]) -> tuple[int, int | None]:
        """How many keys of `place` this file has, and the line (from 1) of the last of them."""
        return _search(self.node, place)


def layers(source: str | Path | Mapping[str, Any]) -> list[Layer]:
    """Read the recipe, the file that it extends, the file that this one extends, and so on.

    Raises:
        RecipeError: a file is missing or is not a recipe, or the files extend each other in a circle.
    """
    if isinstance(source, Mapping):
        found = [Layer("recipe", Path(), dict(source), None)]
    else:
        found = [_layer(str(source), find(str(source)))]
    seen = [] if isinstance(source, Mapping) else [find(str(source)).resolve()]
    while (base := found[-1].raw.pop("extends", None)) is not None:
        last = found[-1]
        line = last.holds(["extends"])[1]
        where = f"{last.name}, line {line}: extends" if line else f"{last.name}: extends"
        if not isinstance(base, str):
            raise RecipeError(f"{where}: expected a path or the name of a packaged recipe, found {base!r}.")
        beside = last.folder / base
        looks_local = beside.is_file() or beside.suffix in (".yaml", ".yml") or "/" in base
        name = str(beside) if looks_local else base
        try:
            path = find(name)
            layer = _layer(name, path)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        found.append(layer)
        if path.resolve() in seen:
            chain = " extends ".join(layer.name for layer in found)
            raise RecipeError(f"{where}: the files extend each other in a circle: {chain}.")
        seen.append(path.resolve())
    return found


def packaged() -> dict[str, list[str]]:
    """The names of the packaged recipes, by the task that they fine-tune on."""
    found: dict[str, list[str]] = {}
    for name in registry.recipes():
        task = next(
            layer.raw["data"]["task"] for layer in layers(name) if "task" in layer.raw.get("data", {})
        )
        found.setdefault(task, []).append(name)
    return dict(sorted(found.items()))


def _layer(name: str, path: Path) -> Layer:
    raw, node = read(path)
    return Layer(name, path.parent, raw, node)


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
        raw = _on_top(raw, layer.raw, (), stage_keys)
    if len(files) > 1 and stem is not None:
        raw.setdefault("name", stem)
    return raw


def _on_top(
    base: Mapping[str, Any], own: Mapping[str, Any], place: tuple[str, ...], stage_keys: Container[str]
) -> dict[str, Any]:
    result = dict(base)
    for key, value in own.items():
        here = (*place, key)
        below, above = _spelt_out(base.get(key), here), _spelt_out(value, here)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            if here[0] in STAGES and not place and _defense(above, below) != _defense(below, {}):
                below = {k: v for k, v in below.items() if k in stage_keys}
            result[key] = _on_top(below, above, here, stage_keys)
        else:
            result[key] = value
    return result


def _defense(stage: Mapping[str, Any], below: Mapping[str, Any]) -> Any:
    return stage.get("defense", below.get("defense", "sft"))


def _spelt_out(value: Any, place: Sequence[str]) -> Any:
    """A bare path or name as a block; any other value is unchanged."""
    bare = BARE.get(".".join(place))
    return {bare: value} if bare and isinstance(value, str) and value != "none" else value


def find(source: str) -> Path:
    """The file of a recipe given by a path or by the name of a packaged recipe."""
    path = Path(source)
    if path.is_file():
        return path
    if source in registry.recipes():
        return registry.recipes()[source]
    if path.is_dir():
        raise RecipeError(f"Expected a recipe file, found a folder: {source}.")
    hint = nearest(source, registry.recipes()).replace("Known:", "Packaged recipes:")
    raise RecipeError(f"No such recipe file: {source}.{hint}")


def read(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """Read the mapping in a YAML file, and its nodes (for line numbers)."""
    try:
        text = path.read_text(encoding="utf-8")
        node, raw = yaml.compose(text, Loader), yaml.load(text, Loader)
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a text file; a recipe is YAML.") from None
    except OSError as error:
        raise RecipeError(f"Cannot read {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping with keys such as model and data, found {_kind(raw)}.")
    return raw, node


def _kind(value: Any) -> str:
    return (
        "nothing" if value is None else {"str": "text", "list": "a list"}.get(type(value).__name__, "a value")
    )


def overridden(raw: Mapping[str, Any], asked: Sequence[str], stage_keys: Container[str]) -> dict[str, Any]:
    """`raw` overridden by `a.b.c=value` (the value is YAML), like the keys of a file that extends it."""
    own: dict[str, Any] = {}
    for override in asked:
        _set(own, override)
    return _on_top(raw, own, (), stage_keys)


def _set(raw: dict[str, Any], asked: str) -> None:
    key, equals, text = asked.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"Expected key=value, found '{asked}'. For example: user.rho=3")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{asked}: the value is not valid YAML.") from None
    *parents, last = key.strip().split(".")
    place = raw
    for depth, parent in enumerate(parents):
        below = _spelt_out(place.get(parent), parents[: depth + 1])
        place[parent] = dict(below) if isinstance(below, Mapping) else {}
        place = place[parent]
    # A bare name and a key of the same block, in either order, are combined into one block.
    here = [*parents, last]
    old, new = _spelt_out(place.get(last), here), _spelt_out(value, here)
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    place[last] = {**old, **new} if both else value


def origin(files: Sequence[Layer], place: Sequence[str]) -> Layer:
    """The file that sets `place`: the first of the files that contain most of its keys."""
    return max(files, key=lambda layer: layer.holds(place)[0])


def explain(error: ValidationError, files: Sequence[Layer], root: type[BaseModel]) -> str:
    """The messages of a validation error, one line each."""
    messages = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        place = [str(part) for part in problem["loc"]] + getattr(cause, "place", [])
        key = ".".join(place)
        layer = origin(files, place)
        line = layer.holds(place)[1]
        where = f"{layer.name}, line {line}" if line else layer.name
        if problem["type"] == "extra_forbidden":
            text = f"unknown key '{key}'.{nearest(place[-1], _siblings(place, root))}"
        elif problem["type"] == "value_error":
            text = f"{key}: {cause}" if key else str(cause)
        elif problem["type"] == "missing":
            text = f"'{key}' is missing"
        else:
            text = f"{key}: {problem['msg'].lower()}, found {problem['input']!r}"
        messages.append(f"{where}: {text}")
    return "\n".join(messages)


def _siblings(place: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The known keys of the block that holds an unknown key."""
    block: Any = root
    for key in place[:-1]:
        if key in getattr(block, "model_fields", {}):
            block = _block(block.model_fields[key].annotation)
    return list(getattr(block, "model_fields", {}))


def _block(annotation: Any) -> Any:
    """The model class in an annotation such as `list[Annotated[X | None, ...]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_block(part) for part in get_args(annotation))
    return next((block for block in found if block is not None), None)


def _search(node: yaml.Node | None, place: Sequence[str]) -> tuple[int, int | None]:
    """How many keys of `place` exist below `node`, and the line of the last; a bare string counts as one."""
    line = None
    for depth, part in enumerate(place):
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == part), None)
            if found is None:
                return depth, line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.ScalarNode) and BARE.get(".".join(place[:depth])) == part:
            node = None
        else:
            return depth, line
    return len(place), line
