"""Read the YAML files of recipes, with the line of each key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import RecipeError

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
"""By block, the key that a bare string sets."""


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads 1e-5 as a number, as YAML 1.2 does, and not as text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Layer:
    """One file of a recipe: the file itself, or one that it extends."""

    name: str
    folder: Path
    raw: dict[str, Any]
    node: yaml.Node | None

    def holds(self, place: Sequence[str]) -> tuple[int, int | None]:
        """Return how many keys of `place` this file contains, and the line (from 1) of the last of them."""
        return _search(self.node, place)


def read(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """Return the mapping in a YAML file, and its nodes (for line numbers)."""
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


def _search(node: yaml.Node | None, place: Sequence[str]) -> tuple[int, int | None]:
    """Return how many keys of `place` exist below `node`, and the line of the last; a bare string counts."""
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
