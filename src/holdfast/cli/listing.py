"""`holdfast list`: the names that recipes can use."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer


class Group(StrEnum):
    """The groups that can be listed."""

    defenses = "defenses"
    attacks = "attacks"
    tasks = "tasks"
    judges = "judges"
    protocols = "protocols"
    recipes = "recipes"
    studies = "studies"


def list_names(
    group: Annotated[Group | None, typer.Argument(help="Group to list. Default: all.")] = None,
) -> None:
    """Show the known defenses, attacks, tasks, judges, protocols, recipes and studies."""
    from holdfast import registry
    from holdfast.cli import console
    from holdfast.recipe import packaged
    from holdfast.study import packaged as studies

    for name in [group] if group else list(Group):
        if name == Group.recipes:
            for task, recipes in packaged.by_task().items():
                rows = [(recipe.name, recipe.about, "") for recipe in recipes]
                console.out.print(console.names_table(f"recipes for {task}", rows))
        elif name == Group.studies:
            rows = [(n, studies.about(path), "") for n, path in studies.grids().items()]
            console.out.print(console.names_table("studies: grids for holdfast sweep", rows))
        elif name == Group.protocols:
            named = packaged.protocols().items()
            rows = [(n, one.block["about"], one.block.get("extends", "")) for n, one in named if one.block]
            console.out.print(console.names_table(name, rows, ("name", "", "extends")))
        elif name == Group.defenses:
            for stage in ("alignment", "user", "post_hoc"):
                faces = registry.faces(name)
                rows = [(n, faces[n].summary, faces[n].facts["paper"]) for n in registry.list_defenses(stage)]
                if rows:
                    console.out.print(console.names_table(f"defenses at the {stage} stage", rows))
        elif name == Group.attacks:
            rows = [(n, face.summary, face.facts["paper"]) for n, face in registry.faces(name).items()]
            console.out.print(console.names_table(name, rows))
        elif name == Group.judges:
            rows = [(n, f.summary, _origin(f.facts)) for n, f in registry.faces(name).items()]
            console.out.print(console.names_table(name, rows))
        else:
            head = ("name@version", "", "measures", "source", "licence")
            console.out.print(console.names_table(name, registry.task_lines(), head))


def _origin(facts: Mapping[str, Any]) -> str:
    """Return a judge's source, its licence, the better direction of its score, and its version."""
    better = f"{facts.get('direction', 'lower')} is better"
    parts = (facts.get("source"), facts.get("licence"), better, f"version {facts.get('version')}")
    return "; ".join(str(part) for part in parts if part)
