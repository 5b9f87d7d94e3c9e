"""Objects of other packages, found by their entry points; one rule for defenses, attacks, tasks and judges.

A package names its object in the entry points `holdfast.defenses`, `holdfast.attacks`, `holdfast.tasks` or
`holdfast.judges`. An object that cannot be imported, has another type, or has a name that is taken is left
out with a `PluginWarning`; everything else works.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from holdfast.errors import first_line


class PluginWarning(UserWarning):
    """An entry point of another package is not used; the message says which one and why."""


@dataclass(frozen=True)
class Plugin:
    """An object of another package.

    Attributes:
        value: the value of its entry point: "module:object".
        package: the name and version of its distribution, as in "toy-package 1.0"; "" if they are unknown.
    """

    name: str
    object: Any
    value: str
    package: str

    @property
    def module(self) -> str:
        """The module that contains the object."""
        return self.value.partition(":")[0]


@dataclass(frozen=True)
class Plugins:
    """The objects of other packages in one group.

    Attributes:
        found: the objects that can be used, by name.
        refused: the reasons why the others cannot, by name; objects whose name is taken are not included.
    """

    found: dict[str, Plugin] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@cache
def plugins(group: str, kind: type, ours: Collection[str]) -> Plugins:
    """Return the objects of other packages in `group`, which are imported once.

    Args:
        kind: the class of which each object must be an instance.
        ours: the names of Holdfast's own objects.
    """
    made = Plugins()
    for entry in entry_points(group=f"holdfast.{group}"):
        taken = made.found.get(entry.name)
        if entry.name in ours:
            _warn(entry, f"the name '{entry.name}' is one of Holdfast's own")
        elif taken is not None and (taken.value, taken.package) == (entry.value, _package(entry)):
            continue  # the same package, found in two places
        elif taken is not None:
            _warn(entry, f"the name '{entry.name}' is taken by {taken.package or taken.value}")
        else:
            reason = _add(made, entry, kind)
            if reason:
                made.refused[entry.name] = _warn(entry, reason)
    for name in made.found:
        made.refused.pop(name, None)
    return made


def _add(made: Plugins, entry: EntryPoint, kind: type) -> str:
    """Add the object of an entry point; returns why it cannot be used, or ""."""
    try:
        thing = entry.load()
    except (Exception, SystemExit) as error:  # the import runs any code of that package
        return f"it cannot be imported: {type(error).__name__}: {first_line(error)}"
    if not isinstance(thing, kind):
        return f"expected a {kind.__name__}, found {type(thing).__name__}"
    if getattr(thing, "name", None) != entry.name:
        return f"its object has the name {getattr(thing, 'name', None)!r}"
    made.found[entry.name] = Plugin(entry.name, thing, entry.value, _package(entry))
    return ""


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""


def _warn(entry: EntryPoint, reason: str) -> str:
    """Warn that an entry point is not used; returns the message."""
    package = _package(entry) or "another package"
    text = f"The {entry.group} entry point '{entry.name}' ({entry.value}) of {package} is not used: {reason}."
    warnings.warn(f"{text} Update or uninstall that package.", PluginWarning, stacklevel=3)
    return text
