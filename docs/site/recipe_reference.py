"""The reference of all recipe keys, made from the models that check a recipe."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from holdfast import registry
from holdfast.recipe import Recipe

HEAD = """# Recipe keys

This page is made from the models that check a recipe: every key with its type and its default.
[Write a recipe](../recipes.md) explains them.
"""


def page() -> str:
    """Return the page in Markdown: one table for each block, then the parameters of each method."""
    parts, waiting, seen = [HEAD], [("", Recipe)], set()
    while waiting:
        path, block = waiting.pop(0)
        if block in seen:
            continue
        seen.add(block)
        parts.append(_block(path, block))
        for name, field in block.model_fields.items():
            waiting += [(f"{path}{name}.", inner) for inner in _models(field.annotation)]
    return "\n\n".join([*parts, *_parameters()]) + "\n"


def _block(path: str, block: type[BaseModel]) -> str:
    title = f"## {path.rstrip('.')}: {block.__name__}" if path else "## The recipe"
    summary = " ".join((block.__doc__ or "").split("\n\n")[0].split())
    rows = [
        f"| `{path}{key}` | {_type(field)} | {_default(field)} |" for key, field in block.model_fields.items()
    ]
    return "\n".join([title, "", summary, "", "| key | type | default |", "|---|---|---|", *rows])


def _parameters() -> list[str]:
    """Return the parameters of defenses and attacks, as their files declare them."""
    found = []
    for group, title in (("defenses", "defense"), ("attacks", "attack")):
        for face in registry.faces(group).values():
            if not face.parameters or face.package:
                continue
            rows = [_parameter(name, parameter) for name, parameter in face.parameters.items()]
            head = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
            found.append("\n".join([f"## The {title} {face.name}", "", *head, *rows]))
    return found


def _parameter(name: str, parameter: registry.Parameter) -> str:
    kind = parameter.type.replace(" | ", " or ")
    return f"| `{name}` | `{kind}` | `{parameter.default}` | {parameter.help} |"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the blocks that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, key)}"
        for limit in field.metadata
        for key, sign in SIGNS
        if hasattr(limit, key)
    ]
    return ", ".join([_name(field.annotation), *limits]).replace("|", "\\|")


WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "dict": "mapping"}
SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def _name(annotation: Any) -> str:
    """Return a type as a reader would write it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _name(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _name(part) for part in get_args(annotation))
    if origin in (tuple, list):
        return f"list of {_name(get_args(annotation)[0])}"
    if origin is not None:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{annotation.__name__} block"
    name = getattr(annotation, "__name__", str(annotation))
    return WORDS.get(name, name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "its own defaults"
    return "none" if value is None else f"`{value}`"
