"""The packaged recipes: one for each protocol, method and task.

`recipes/NAME.yaml` is a protocol: a recipe without a method and a task, with a block `protocol` on top:

- `name`: the name of its recipes, with {method} and {task};
- `names`: words for {method}, by method; the default is the method's name with hyphens for underscores;
- `about`: the description in `holdfast list recipes`;
- `extends`: the protocol that it is based on;
- `tasks`: the changes for each task;
- `baselines`: recipes that are not a method: their changes, by the word for {method}.

The methods are those that name the protocol in their `protocols`, with the recipe keys that each of them
changes. A file without such a block is itself a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from holdfast import registry
from holdfast.recipe.reading import Layer, read

FOLDER = registry.PACKAGE / "recipes"
STAGES = ("alignment", "user", "post_hoc")


@dataclass(frozen=True)
class Packaged:
    """A packaged recipe.

    Attributes:
        about: one line for lists.
        protocol: the name of its file.
        task: the task of the fine-tuning.
        changes: the recipe keys that its method changes in the protocol.
    """

    name: str
    about: str
    protocol: str
    task: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """A file of `recipes/`: the keys of its recipes, and the block `protocol`, empty for a plain recipe."""

    path: Path
    raw: Mapping[str, Any]
    node: yaml.Node | None
    block: Mapping[str, Any]


@cache
def protocols() -> dict[str, Protocol]:
    """Return the files of the folder by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        raw, node = read(path)
        block = raw.pop("protocol", {})
        found[path.stem] = Protocol(path, raw, node, block)
    return found


def recipes() -> dict[str, Packaged]:
    """Return every packaged recipe by name; if two have the same name, the first is kept."""
    found: dict[str, Packaged] = {}
    for name, protocol in protocols().items():
        for made in _recipes_of(name, protocol):
            found.setdefault(made.name, made)
    return dict(sorted(found.items()))


def by_task() -> dict[str, list[Packaged]]:
    """Return the packaged recipes by the task of their fine-tuning."""
    found: dict[str, list[Packaged]] = {}
    for made in recipes().values():
        found.setdefault(made.task, []).append(made)
    return dict(sorted(found.items()))


def layers(made: Packaged) -> list[Layer]:
    """Return the layers of a recipe, the method's changes first; the caller may modify them."""
    found = [Layer(made.name, FOLDER, {"name": made.name, **deepcopy(dict(made.changes))}, None)]
    protocol: Protocol | None = protocols()[made.protocol]
    while protocol is not None:
        tasks = protocol.block.get("tasks", {})
        if made.task in tasks:
            place = ("protocol", "tasks", made.task)
            changes = {"data": {"task": made.task}, **deepcopy(tasks[made.task])}
            found.append(Layer(protocol.path.name, FOLDER, changes, _node(protocol.node, place)))
        found.append(Layer(protocol.path.name, FOLDER, deepcopy(dict(protocol.raw)), protocol.node))
        protocol = protocols().get(protocol.block.get("extends", ""))
    return found


def _recipes_of(name: str, protocol: Protocol) -> list[Packaged]:
    block = protocol.block
    if not block:
        about = protocol.path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        return [Packaged(name, about, name, protocol.raw["data"]["task"])]
    variants: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for method, face in registry.faces("defenses").items():
        changes = face.facts.get("protocols", {}).get(name)
        if changes is not None:
            word = block.get("names", {}).get(method, method.replace("_", "-"))
            what = face.summary.partition(": ")[2].rstrip(".") or face.summary
            variants[word] = f"{face.facts.get('label', method)}: {what}", _named(method, changes)
    for word, baseline in block.get("baselines", {}).items():
        variants[word] = baseline["about"], {k: v for k, v in baseline.items() if k != "about"}
    return [
        Packaged(
            block["name"].format(method=word, task=task), f"{what} [{block['about']}].", name, task, changes
        )
        for word, (what, changes) in variants.items()
        for task in block["tasks"]
    ]


def _named(method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with the method's name in the block of its stage: the last stage in the changes."""
    stage = next((name for name in reversed(STAGES) if name in changes), "user")
    return {**changes, stage: {"defense": method, **changes.get(stage, {})}}


def _node(node: yaml.Node | None, place: tuple[str, ...]) -> yaml.Node | None:
    """Return the node below the keys of `place`."""
    for key in place:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in pairs if name.value == key), None)
    return node
