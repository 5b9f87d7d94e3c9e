"""A named protocol below a recipe: `protocol: NAME` sets the keys of a paper that the recipe does not set.

From the lowest to the highest, the keys are those of the protocol's file (and of the protocol that it
extends), the changes for the task, the settings of the recipe's methods in that protocol, and the recipe's
own keys.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from holdfast import registry
from holdfast.errors import RecipeError, nearest
from holdfast.recipe import layers, packaged
from holdfast.recipe.reading import Layer

STAGES = packaged.STAGES
CHOSEN = ("name", "protocol", "data.task", *(f"{stage}.defense" for stage in STAGES))
"""Keys that a recipe chooses within a protocol; they are not changes of it."""


def known(name: Any, where: str = "protocol") -> str:
    """Return the protocol that `name` means. Raises RecipeError with the nearest name if there is none."""
    asked = packaged.ALIASES.get(str(name), str(name))
    if asked not in packaged.protocols():
        raise RecipeError(f"{where}: unknown protocol '{name}'.{nearest(asked, packaged.names())}")
    return asked


def below(
    name: str, upper: Mapping[str, Any], stage_keys: Container[str]
) -> tuple[list[Layer], dict[str, Any]]:
    """Return the files of a protocol, and the recipe `upper` on top of its settings."""
    files = packaged.protocol_layers(name, _task(upper))
    base = layers.merged(files, stage_keys, None)
    base.pop("name", None)
    for stage in STAGES:
        method = _method(stage, upper, base)
        given = layers.spelt_out(upper.get(stage), (stage,))
        settings = _settings(name, stage, method, given if isinstance(given, Mapping) else {})
        base = layers.on_top(base, settings, (), stage_keys)
    if isinstance(upper.get("evaluation"), str) or "protocol" in (upper.get("evaluation") or {}):
        base.pop("evaluation", None)  # the recipe names another protocol for the evaluation
    return files, layers.on_top(base, upper, (), stage_keys)


def _task(upper: Mapping[str, Any]) -> str | None:
    """The task of a recipe, or the data set that its user rows are read as."""
    data = upper.get("data")
    if not isinstance(data, Mapping):
        return None
    named = data.get("task") or data.get("user")
    return named.partition(":")[0] if isinstance(named, str) else None


def _method(stage: str, upper: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """The method at a stage; None if the stage does not run."""
    if stage in upper and layers.stops(upper[stage]):
        return None
    found: str | None = None if stage == "post_hoc" else "sft"
    for raw in (base, upper):
        block = layers.spelt_out(raw.get(stage), (stage,))
        if isinstance(block, Mapping) and isinstance(block.get("defense"), str):
            found = block["defense"]
    return found


def _settings(name: str, stage: str, method: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a method changes in the nearest protocol that it names; {} if it names none.

    Of parameters that exclude each other, none is set if the recipe gives one of them.
    """
    face = registry.faces("defenses").get(method or "")
    if face is None:
        return {}
    for protocol in packaged.chain(name):
        changes = packaged.settings(face).get(protocol)
        if changes is not None and packaged.stage_of(face, changes) == stage:
            found = packaged.named(face, changes)
            exclusive = face.facts.get("one_of", ())
            if any(key in given for key in exclusive):
                found[stage] = {k: v for k, v in found[stage].items() if k not in exclusive}
            return found
    return {}


def references(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return recipes that make the same choices within the protocol and change as little as possible.

    The first changes nothing. A method that is not part of the protocol may need more than it gives (a
    threshold, alignment rows): the next ones take over these blocks of the recipe.
    """
    least = _reference(recipe)
    repaired = {**least, "post_hoc": recipe["post_hoc"] or "none"}
    rows = {key: recipe["data"][key] for key in ("alignment", "harmful")}
    return [least, repaired, {**repaired, "data": {**least["data"], **rows}}, dict(recipe)]


def _reference(recipe: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"protocol": recipe["protocol"], "model": {}}
    found["data"] = {key: recipe["data"][key] for key in ("task", "user") if recipe["data"][key] is not None}
    if "task" in found["data"]:
        found["data"].pop("user", None)
    for stage in STAGES:
        block = recipe[stage]
        found[stage] = "none" if block is None else {"defense": block["defense"]}
    return found


def differences(recipe: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys in which a recipe differs from the published one, with the recipe's values."""
    ours, theirs = _flat(recipe), _flat(published)
    return {
        key: ours.get(key)
        for key in dict.fromkeys([*theirs, *ours])
        if key not in CHOSEN and ours.get(key) != theirs.get(key)
    }


def _flat(value: Mapping[str, Any], place: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of all blocks by their whole keys; a list is one value."""
    found: dict[str, Any] = {}
    for key, part in value.items():
        here = (*place, key)
        found |= _flat(part, here) if isinstance(part, Mapping) else {".".join(here): part}
    return found
