"""The layout: one import direction between folders, no import cycle between files, a small public API."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import holdfast
from places import HEAVY

PACKAGE = Path(holdfast.__file__).parent
ALLOWED = {
    "__main__": {"cli"},
    "cli": {
        "study", "pipeline", "measuring", "reporting", "recipe", "registry", "plugins", "defenses", "data",
        "weights", "lab", "integrations",
    },
    "integrations": {
        "data", "defenses", "evaluation", "measuring", "probe", "recipe", "registry", "weights",
    },
    "study": {"pipeline", "recipe", "reporting"},
    "pipeline": {
        "measuring", "recipe", "registry", "attacks", "defenses", "reporting", "evaluation", "data", "tasks",
        "training", "models", "weights", "world",
    },
    "measuring": {
        "recipe", "registry", "attacks", "training", "evaluation", "data", "tasks", "models", "weights", "chat",
    },
    "recipe": {"registry", "weights"},
    "probe": {"registry", "evaluation", "data", "chat"},
    "registry": {"plugins", "attacks", "defenses", "evaluation", "tasks"},
    "attacks": {"models", "tasks", "training", "weights"},
    "defenses": {"training", "weights"},
    "reporting": {"evaluation"},
    "evaluation": {"models", "weights", "tasks", "world", "chat"},
    "data": {"tasks", "world", "chat"},
    "training": {"chat"},
    "chat": set(),
    "models": {"training", "weights"},
    "weights": {"lab", "world"},
    "tasks": {"plugins"},
    "plugins": set(),
    "world": set(),
    "lab": set(),
    "machine": set(),
    "errors": set(),
}  # fmt: skip
"""What the files of each folder may import, besides their own folder, `machine` and `errors`."""

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The Holdfast modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "holdfast":
            home = (node.module or "").removeprefix("holdfast").removeprefix(".")
            for alias in node.names:
                inside = f"{home}.{alias.name}".strip(".")
                found.add(inside if inside in MODULES else home)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("holdfast.") for a in node.names if a.name.startswith("holdfast.")}
    return found - {""}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_import_direction(path):
    mine = module_of(path).split(".")[0]
    assert {module.split(".")[0] for module in imported(path)} <= ALLOWED[mine] | {mine, "machine", "errors"}


def test_no_circle_between_folders():
    TopologicalSorter({folder: below - {folder} for folder, below in ALLOWED.items()}).prepare()


def test_no_circle_between_files():
    """A folder's `__init__` may import its files; the files do not import from it."""
    TopologicalSorter({module: imported(path) - {module} for module, path in MODULES.items()}).prepare()


def test_every_folder_says_its_idea_and_what_others_may_use():
    """Its docstring starts with one line, and `__all__` names everything that other folders import."""
    listed: dict[str, set[str]] = {}
    for path in FILES:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert (ast.get_docstring(tree) or "").split("\n")[0].endswith("."), path
            named = [
                n.value
                for n in tree.body
                if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
            ]
            assert named, f"{path} has no __all__"
            listed[module_of(path)] = set(ast.literal_eval(named[0]))
    for path in FILES:
        mine = module_of(path).split(".")[0]
        for module in imported(path):
            folder, _, inside = module.partition(".")
            if folder != mine and inside and folder in listed:
                assert inside.split(".")[0] in listed[folder], (
                    f"{path}: {module} is not in {folder}'s __all__"
                )


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(' '.join(sys.modules), file=sys.stderr)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import holdfast",
        "from holdfast.cli import app",
        "from holdfast import Recipe, plan, get_defense, list_defenses; list_defenses()",
        "import sys; sys.argv=['holdfast', 'list']; from holdfast.cli.app import app; app(standalone_mode=False)",
        "from holdfast import Recipe, plan; plan(Recipe.load('world'))",
    ],
)
def test_light_parts_import_nothing_heavy(code):
    assert not modules_after(code) & HEAVY


def test_no_two_test_files_have_the_same_name():
    """pytest imports them by their names alone, and refuses a second file of a name."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_public_names():
    assert holdfast.__all__ == [
        "Defense", "Recipe", "SafetyProbe", "__version__", "apply_safe_lora", "compare", "gate", "generate", "get_defense", "list_defenses",
        "mix", "moderate", "plan", "rate", "report", "run", "safe_lora", "score", "sweep",
    ]  # fmt: skip
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None
    import_module("holdfast.reporting")  # importing a folder hides no function
    assert callable(holdfast.report)
    with pytest.raises(AttributeError):
        holdfast.nothing  # noqa: B018


def test_nothing_is_loaded_with_pickle_or_foreign_code():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text
        assert "from pickle" not in text or path.name == "private.py", "only there, with a list of names"
        assert "trust_remote_code=True" not in text
        assert "torch.load(" not in text
