"""Recipe files: finding and reading them, `key=value` overrides, and messages that name key and line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from holdfast import registry
from holdfast.errors import RecipeError, nearest

BARE = {
    "model": "path",
    "data.alignment": "source",
    "alignment": "defense",
    "user": "defense",
    "post_hoc": "defense",
}
"""The key that a bare string stands for."""


def find(source: str) -> Path:
    """The file behind a path or the name of a packaged recipe."""
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
    """The mapping in a YAML file, and its nodes (for line numbers)."""
    try:
        text = path.read_text(encoding="utf-8")
        node, raw = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
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


def override(raw: dict[str, Any], asked: str) -> None:
    """Set `a.b.c=value` in place; the value is YAML."""
    key, equals, text = asked.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"Expected key=value, found '{asked}'. For example: user.rho=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"{asked}: the value is not valid YAML.") from None
    *parents, last = key.strip().split(".")
    place = raw
    for depth, parent in enumerate(parents):
        below = place.get(parent)
        if isinstance(below, str):  # a bare path or name: spelt out, so that it is kept
            bare = BARE.get(".".join(parents[: depth + 1]))
            below = {bare: below} if bare and below != "none" else {}
        place[parent] = dict(below) if isinstance(below, Mapping) else {}
        place = place[parent]
    place[last] = value


def explain(error: ValidationError, name: str, lines: yaml.Node | None, root: type[BaseModel]) -> str:
    """One line for each thing that is wrong."""
    messages = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        place = [str(part) for part in problem["loc"]] + getattr(cause, "place", [])
        key = ".".join(place)
        line = _line(lines, place)
        where = f"{name}, line {line}" if line else name
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
    """The keys that could stand where an unknown one stands."""
    block: Any = root
    for key in place[:-1]:
        if key in getattr(block, "model_fields", {}):
            block = _block(block.model_fields[key].annotation)
    return list(getattr(block, "model_fields", {}))


def _block(annotation: Any) -> Any:
    """The model class within an annotation such as `list[Annotated[X | None, ...]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_block(part) for part in get_args(annotation))
    return next((block for block in found if block is not None), None)


def _line(node: yaml.Node | None, place: Sequence[str]) -> int | None:
    """The line (from 1) of the deepest key of `place` that stands in the file."""
    line = None
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line
