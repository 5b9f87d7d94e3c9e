"""The packaged recipes: one for each protocol, method and task.

`recipes/NAME.yaml` is a protocol: a recipe without a method and a task, with a block `protocol` on top. A
recipe takes it with the key `protocol: NAME` (`holdfast.recipe.named`). The block has:

- `name`: the name of its recipes, with {method} and {task};
- `names`: words for {method}, by method; the default is the method's name with hyphens for underscores;
- `about`: the description in `holdfast list recipes`;
- `extends`: the protocol that it is based on;
- `tasks`: the tasks of its recipes, each with its changes, which are made on top of those of the protocol
  that it extends;
- `baselines`: recipes that are not a method: their changes, by the word for {method}.

The recipes' methods are those that name the protocol in their `protocols`, with the recipe keys that each of
them changes. A file without such a block is itself a recipe.
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
ALIASES = {"lisa": "lisa-code", "t_vaccine": "t-vaccine", "safe_lora": "safe-lora", "refusal": "t-vaccine"}
"""Names of protocols in earlier versions."""


@dataclass(frozen=True)
class Packaged:
    """A packaged recipe.

    Attributes:
        about: one line for lists.
        protocol: the name of its file.
        task: the task of the fine-tuning.
        changes: the recipe keys that choose its method.
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


def names() -> list[str]:
    """Return the names of all protocols, including those of earlier versions."""
    return [*(name for name, found in protocols().items() if found.block), *ALIASES]


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
    """Return the layer of a recipe above its protocol; the caller may modify it."""
    if not protocols()[made.protocol].block:  # the file is the recipe
        protocol = protocols()[made.protocol]
        return [Layer(protocol.path.name, FOLDER, deepcopy(dict(protocol.raw)), protocol.node)]
    data: dict[str, Any] = {"task": made.task}
    for name in reversed(chain(made.protocol)):  # the sources of the rows choose the task
        given = protocols()[name].block.get("tasks", {}).get(made.task, {}).get("data", {})
        data |= {key: given[key] for key in ("task", "user") if key in given}
    named = {"name": made.name, "protocol": made.protocol, "data": data}
    return [Layer(made.name, FOLDER, {**named, **deepcopy(dict(made.changes))}, None)]


def chain(name: str) -> list[str]:
    """Return a protocol and those that it extends, in order."""
    found = [name]
    while (base := protocols()[found[-1]].block.get("extends")) is not None:
        found.append(base)
    return found


def protocol_layers(name: str, task: str | None) -> list[Layer]:
    """Return the layers of a protocol, its changes for the task first; the caller may modify them."""
    found = []
    for protocol in map(protocols().__getitem__, chain(name)):
        tasks = protocol.block.get("tasks", {})
        if task in tasks:
            place = ("protocol", "tasks", str(task))
            found.append(
                Layer(protocol.path.name, FOLDER, deepcopy(tasks[task]), _node(protocol.node, place))
            )
        found.append(Layer(protocol.path.name, FOLDER, deepcopy(dict(protocol.raw)), protocol.node))
    return found


def evaluation(name: str) -> dict[str, Any]:
    """Return the block `evaluation` of a protocol, with the keys of those that it extends."""
    found: dict[str, Any] = {}
    for protocol in reversed(chain(name)):
        found |= protocols()[protocol].raw.get("evaluation", {})
    return deepcopy(found)


def _recipes_of(name: str, protocol: Protocol) -> list[Packaged]:
    block = protocol.block
    if not block:
        about = protocol.path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        return [Packaged(name, about, name, protocol.raw["data"]["task"])]
    variants: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for method, face in registry.faces("defenses").items():
        changes = settings(face).get(name)
        if changes is not None:
            word = block.get("names", {}).get(method, method.replace("_", "-"))
            what = face.summary.partition(": ")[2].rstrip(".") or face.summary
            own = {stage_of(face, changes): {"defense": method}}
            variants[word] = f"{face.facts.get('label', method)}: {what}", own
    for word, baseline in block.get("baselines", {}).items():
        variants[word] = baseline["about"], {k: v for k, v in baseline.items() if k != "about"}
    return [
        Packaged(
            block["name"].format(method=word, task=task.replace("_", "-")),
            f"{what} [{block['about']}].",
            name,
            task,
            changes,
        )
        for word, (what, changes) in variants.items()
        for task in block["tasks"]
    ]


def settings(face: registry.Face) -> dict[str, Mapping[str, Any]]:
    """Return the keys that a method changes, by the name of each protocol that it names."""
    return {ALIASES.get(name, name): changes for name, changes in face.facts.get("protocols", {}).items()}


def stage_of(face: registry.Face, changes: Mapping[str, Any]) -> str:
    """Return the stage of a method from the keys that it changes: the last one at which it acts."""
    acts = face.facts["stages"]
    return next((stage for stage in reversed(STAGES) if stage in changes and stage in acts), acts[-1])


def named(face: registry.Face, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with the method's name in the block of its stage."""
    stage = stage_of(face, changes)
    return {**deepcopy(dict(changes)), stage: {"defense": face.name, **deepcopy(changes.get(stage, {}))}}


def _node(node: yaml.Node | None, place: tuple[str, ...]) -> yaml.Node | None:
    """Return the node below the keys of `place`."""
    for key in place:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in pairs if name.value == key), None)
    return node
