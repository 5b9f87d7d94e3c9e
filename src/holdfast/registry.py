"""Defenses, attacks, tasks and judges by name, found in their folders and in entry points.

No file of ours is imported to list or to check a name. A method's parameters are read from its file with
`ast`, so that a recipe can be checked, planned and explained without torch; `get_defense` and similar
functions import only the file that they return an object from.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from holdfast.errors import RecipeError, first_line, nearest
from holdfast.plugins import Plugin, Plugins, plugins
from holdfast.tasks import METRICS, DataSet, Metric

if TYPE_CHECKING:
    from holdfast.defenses import Defense

PACKAGE = Path(__file__).parent
FOLDERS = {"defenses": "defenses", "attacks": "attacks", "tasks": "tasks", "judges": "evaluation/judges"}
OBJECTS = {"defenses": "DEFENSE", "attacks": "ATTACK", "tasks": "TASK", "judges": "JUDGE"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its default, its type as written, and its help text."""

    default: Any
    type: str
    help: str = ""


@dataclass(frozen=True)
class Face:
    """The description of a method, task or judge, read from its file without importing it.

    `facts` are the literal arguments of the file's closing object (`stages`, `paper`, `licence`, ...); `code`
    are the names of its other arguments (`trainer`, `mix`, `prefix`, ...); `type` is the object's class
    ("Task"); `summary` is the first line of the docstring; `package` is the name and version of the
    distribution, or "" for our own.
    """

    name: str
    module: str
    summary: str
    facts: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    code: frozenset[str] = frozenset()
    type: str = ""
    package: str = ""


@cache
def faces(group: str) -> dict[str, Face]:
    """Return every object of a group by name: our own, then the working ones of other packages."""
    return _own(group) | {name: _imported_face(plugin) for name, plugin in _plugins(group).found.items()}


def face(group: str, name: str) -> Face:
    """Return the description of `name` without importing it; a name ending in .py is a user's own file.

    The version of such a file ends in eight digits of the hash of its content, so that results of an older
    version are not reused.

    Raises:
        RecipeError: nothing has that name; the message gives the nearest name.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"There is no file {name} with a {group.rstrip('s')}.")
        found = _read_face(path, f"_holdfast_{path.stem}", OBJECTS[group])
        if found is None:
            raise RecipeError(f"{name} does not end in `{OBJECTS[group]} = ...(...)`, which declares it.")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        version = f"{found.facts.get('version', '0')}-{digest}"
        return replace(found, facts={**found.facts, "version": version})
    if name not in faces(group):
        text = unknown(group, name)
        raise RecipeError(text[0].upper() + text[1:])
    return faces(group)[name]


def unknown(group: str, name: str, known: Collection[str] | None = None) -> str:
    """Return why a name cannot be used: the reason that its plug-in is refused, or the nearest known name.

    Args:
        known: the names among which to look for the nearest one; all by default.
    """
    refused = _plugins(group).refused
    if name in refused:
        return refused[name]
    hint = nearest(name, faces(group) if known is None else known)
    return f"unknown {group.removesuffix('s')} '{name}'.{hint}"


def get(group: str, name: str) -> Any:
    """Import and return the object called `name`.

    Raises:
        RecipeError: nothing has that name; the message gives the nearest name.
    """
    found = face(group, name)
    if name.endswith(".py"):
        return getattr(_run_file(found.module, Path(name)), OBJECTS[group])
    plugin = _plugins(group).found.get(name)
    if plugin is not None:
        return plugin.object
    return getattr(importlib.import_module(found.module), OBJECTS[group])


def get_defense(name: str) -> Defense:
    """Import and return the defense called `name`."""
    return get("defenses", name)


def list_defenses(stage: str | None = None) -> list[str]:
    """Return the names of all defenses, or of those at `stage`: "alignment", "user" or "post_hoc"."""
    return sorted(
        name for name, face in faces("defenses").items() if stage is None or stage in face.facts["stages"]
    )


def task_lines() -> list[tuple[str, str, str, str, str]]:
    """Return for each data set: its stamp, summary, metric and the better direction, source, licence."""
    lines = []
    for name, face in faces("tasks").items():
        facts = face.facts
        metric = facts.get("metric") or ("accuracy" if "grade" in face.code else "harmful_score")
        known = METRICS.get(metric, Metric(metric))
        measures = f"{known.title} {'↓' if known.direction == 'lower' else '↑'}"
        if known.judged and known.direction == "higher":
            measures += " by a judge"
        if {"unsafe", "benign"} <= set(facts.get("kinds", ())):  # two sides, which are never averaged
            measures = "harmful score ↓ and benign compliance ↑"
        source = facts.get("hub_id") or ("Holdfast" if facts.get("licence") == "Apache-2.0" else "your file")
        stamp = f"{name}@{facts.get('version', 1)}"
        lines.append((stamp, str(facts["summary"]), measures, source, str(facts.get("licence") or "")))
    return lines


@cache
def training_arguments() -> dict[str, Parameter]:
    """Return the fields of `transformers.TrainingArguments`, read from its source to save an import."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError("transformers is not installed. Install it: pip install 'transformers>=5'.")
    path = Path(spec.submodule_search_locations[0]) / "training_args.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return _fields(_class(tree, "TrainingArguments"))


def _run_file(module: str, path: Path) -> ModuleType:
    """Run a user's own file and return it as a module."""
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made  # dataclasses look up their module
    try:
        spec.loader.exec_module(made)
    except Exception as error:  # the user's code can raise any exception
        raise RecipeError(
            f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    return made


@cache
def _own(group: str) -> dict[str, Face]:
    """Return our own descriptions, read from the files in the group's folder."""
    found = {}
    folder = PACKAGE / FOLDERS[group]
    for path in sorted(folder.glob("*.py")):
        face = _read_face(path, f"holdfast.{FOLDERS[group].replace('/', '.')}.{path.stem}", OBJECTS[group])
        if face is not None:
            found[face.name] = face
    return found


def _plugins(group: str) -> Plugins:
    """Return the objects of other packages."""
    return plugins(group, _kind(group), frozenset(_own(group)))


def _kind(group: str) -> type:
    """Return the class of the objects in a group."""
    if group == "defenses":
        from holdfast.defenses import Defense

        return Defense
    if group == "attacks":
        from holdfast.attacks import Attack

        return Attack
    if group == "judges":
        from holdfast.evaluation.judges import Judge

        return Judge
    return DataSet


def _imported_face(plugin: Plugin) -> Face:
    """Return the description of another package's object, which is imported."""
    thing = plugin.object
    summary = (importlib.import_module(plugin.module).__doc__ or "").strip().split("\n")[0]
    simple = (str, int, float, bool, tuple, Mapping)
    facts = {k: v for k, v in vars(thing).items() if isinstance(v, simple) and k != "name"}
    config = getattr(thing, "config", None)
    config = config if is_dataclass(config) else None
    plain = {*training_arguments(), "max_length", "loss_on", "lean_loss"} if config else set()
    parameters = {
        f.name: Parameter(
            f.default if f.default_factory is MISSING else f.default_factory(),
            f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)),
            f.metadata.get("help", ""),
        )
        for f in (fields(config) if config else ())
        if f.name not in plain
    }
    code = frozenset(k for k, v in vars(thing).items() if callable(v))
    kind = type(thing).__name__
    return Face(plugin.name, plugin.module, summary, facts, parameters, code, kind, plugin.package)


def _read_face(path: Path, module: str, closing: str) -> Face | None:
    """Return the description in a file that ends in `<closing> = Something(...)`; None for any other file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    call = next(
        (
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and any(isinstance(t, ast.Name) and t.id == closing for t in node.targets)
        ),
        None,
    )
    if call is None:
        return None
    facts, config, code = {}, None, set()
    for keyword in call.keywords:
        if keyword.arg == "config" and isinstance(keyword.value, ast.Name):
            config = keyword.value.id
            continue
        try:
            facts[keyword.arg or ""] = ast.literal_eval(keyword.value)
        except ValueError:
            code.add(keyword.arg or "")  # a class or a function, known only after an import
    summary = (ast.get_docstring(tree) or "").split("\n")[0]
    parameters = _parameters(tree, config) if config else {}
    made = call.func.id if isinstance(call.func, ast.Name) else ""
    return Face(facts.pop("name"), module, summary, facts, parameters, frozenset(code), made)


def _parameters(tree: ast.Module, config: str) -> dict[str, Parameter]:
    """Return the fields of a Config and of the Configs in sibling files that it extends, base class first."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and config in {alias.name for alias in statement.names}:
            return _parameters(_tree_of(statement.module or ""), config)  # it is defined in another file
    node = _class(tree, config)
    inherited: dict[str, Parameter] = {}
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        for statement in tree.body:
            if (
                isinstance(statement, ast.ImportFrom)
                and (statement.module or "").startswith("holdfast.defenses.")
                and base.id in {alias.name for alias in statement.names}
            ):
                inherited |= _parameters(_tree_of(statement.module or ""), base.id)
    return inherited | _fields(node)


def _tree_of(module: str) -> ast.Module:
    """Return the syntax tree of one of our modules."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(node: ast.ClassDef) -> dict[str, Parameter]:
    """Annotated fields with a literal default, bare or as `field(default=..., metadata={"help": ...})`."""
    found = {}
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        value, help_text = item.value, ""
        if isinstance(value, ast.Call):
            arguments = {k.arg: k.value for k in value.keywords}
            value = arguments.get("default")
            metadata = arguments.get("metadata")
            if isinstance(metadata, ast.Dict):
                help_text = next(
                    (str(_literal(v)) for k, v in zip(metadata.keys, metadata.values, strict=True)
                     if k is not None and _literal(k) == "help"), ""
                )  # fmt: skip
        found[item.target.id] = Parameter(
            _literal(value) if value else None, ast.unparse(item.annotation), help_text
        )
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
