"""Read the YAML files of recipes, with the line of each key."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import RecipeError, first_line

BARE = {
    "model": "path",
    "data.alignment": "source",
    "data.attack": "name",
    "data.filter": "judge",
    "data.alignment.harmful": "source",
    "alignment": "defense",
    "user": "defense",
    "post_hoc": "defense",
    "post_hoc_attack": "name",
    "evaluation": "protocol",
}
"""By block, the key that a bare string sets."""


MOST = 10_000
"""The largest number of values in a recipe, with those that aliases repeat."""

LARGEST = 2**20
"""The largest size of a recipe file in bytes."""


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads 1e-5 as a number, as YAML 1.2 does, and names the line of every error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; PyYAML's constructors raise more than YAML errors."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            shown = shorten(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            text = f"{shown} cannot be read as a value ({first_line(error)[:60]}); put a text in quotes"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark) from None


# No two parts of the pattern match the same digits, or a long number would take a long time.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def shorten(value: Any) -> str:
    """Return a value for a message: its representation, cut if it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel, short.maxdict, short.maxlist = 3, 8, 8
    try:
        text = short.repr(value)
        return text if len(text) <= 200 else f"{text[:200]}..."
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return "a number of thousands of digits"


def parse(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """Return the value in a YAML text, and its nodes.

    Args:
        where: the file, for messages.

    Raises:
        RecipeError: it is not valid YAML, or has what no recipe needs: repeated keys, keys that are not text,
            values that contain themselves, or too many of them.
    """
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check(node)
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        tab = " Indent with spaces, not tabs." if "'\\t'" in str(error.problem) else ""
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context}.{tab}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(f"{where}, line {line}: not valid YAML: {error.reason}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        text = "values are nested too deeply" if deep else first_line(error)
        raise RecipeError(f"{where}: not valid YAML: {text}.") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check(root: yaml.Node) -> None:
    """Raise MarkedYAMLError for keys that are repeated or no text, and for values without end."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in inside:
            raise _wrong("an alias contains itself", node)
        if id(node) not in sizes:
            inside.add(id(node))
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                children = [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            sizes[id(node)] = 1 + sum(map(size, children))
            inside.remove(id(node))
        if sizes[id(node)] > MOST:
            raise _wrong(f"more than {MOST:,} values, with those that aliases repeat", node)
        return sizes[id(node)]

    size(root)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            shown = shorten(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise _wrong(f"expected a text as key, found {shown}; put it in quotes if it is one", key)
        if key.value in seen:
            text = f"the key {shorten(key.value)} appears twice, first in line {seen[key.value]}"
            raise _wrong(text, key)
        seen[key.value] = key.start_mark.line + 1


def _wrong(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


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
    """Return the mapping in a YAML file, and its nodes (for line numbers).

    Raises:
        RecipeError: it cannot be read, or is not a recipe.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{path} has more than {LARGEST:,} bytes; expected a recipe.")
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"Cannot read {path}: {error.strerror}.") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path} is UTF-16. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{path}, line {line}: this is not a text file in UTF-8; a recipe is YAML in UTF-8."
        ) from None
    raw, node = parse(text, str(path))
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
