"""One import direction; light subcommands; a small public face; a small, listed tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast

PACKAGE = Path(holdfast.__file__).parent
ALLOWED = {
    "cli": {
        "processes",
        "combine_command",
        "console",
        "demo",
        "pipeline",
        "report",
        "recipe",
        "recipe_file",
        "registry",
        "measure_commands",
        "safe_lora_command",
        "store",
        "data",
    },
    "measure_commands": {"comparing", "console", "filtering", "measure"},
    "filtering": {"answer_files", "data", "evaluation", "judging", "measure", "store"},
    "answer_files": {"data", "evaluation", "store"},
    "safe_lora_command": {"console", "defenses", "report"},
    "__main__": {"cli"},
    "console": {"progress"},
    "combine_command": {"console", "weights"},
    "demo": {"pipeline", "recipe", "registry", "report", "store", "progress"},
    "steps": {"context", "recipe", "store"},
    "judging": {
        "evaluation",
        "recipe",
        "recipe_evaluation",
        "registry",
        "store",
        "tasks",
        "weights",
        "work",
    },
    "evaluating": {
        "cost",
        "context",
        "data",
        "evaluation",
        "judging",
        "recipe_evaluation",
        "registry",
        "store",
        "weights",
        "work",
        "world",
    },
    "pipeline": {
        "user_data",
        "steps",
        "evaluating",
        "judging",
        "post_hoc",
        "processes",
        "context",
        "mixed",
        "preflight",
        "work",
        "results",
        "recipe",
        "recipe_stages",
        "registry",
        "store",
        "progress",
        "weights",
    },
    "post_hoc": {"context", "recipe", "registry", "store", "weights", "work"},
    "work": {
        "context",
        "mixed",
        "training",
        "data",
        "tasks",
        "weights",
        "world",
        "recipe",
        "registry",
        "store",
    },
    "preflight": {
        "user_data",
        "context",
        "evaluation",
        "judging",
        "mixed",
        "post_hoc",
        "registry",
        "recipe_stages",
        "training",
        "data",
        "weights",
        "work",
    },
    "mixed": {"registry"},
    "user_data": {
        "anchoring",
        "context",
        "data",
        "filtering",
        "judging",
        "recipe",
        "recipe_data",
        "seeds",
        "weights",
        "work",
    },
    "anchoring": {"defenses", "evaluation"},
    "context": {"processes", "data", "weights", "recipe", "store", "progress"},
    "results": {
        "paired",
        "user_data",
        "evaluation",
        "context",
        "registry",
        "work",
        "steps",
        "recipe",
        "store",
        "report",
    },
    "cost": set(),
    "training": {"cost", "processes", "defenses", "weights", "store", "progress", "seeds"},
    "recipe": {
        "recipe_data",
        "recipe_evaluation",
        "recipe_parts",
        "recipe_stages",
        "recipe_file",
        "registry",
        "store",
        "weights",
    },
    "recipe_data": {"recipe_evaluation", "recipe_parts", "registry"},
    "recipe_evaluation": {"recipe_parts", "recipe_protocols", "registry"},
    "recipe_protocols": set(),
    "recipe_stages": {"recipe_parts", "registry"},
    "recipe_parts": {"weights"},
    "recipe_file": {"registry"},
    "registry": {"defenses", "tasks"},
    "defenses": {"weights", "seeds"},
    "data": {"tasks", "seeds", "world", "store"},
    "evaluation": {"paired", "seeds", "tasks", "weights", "world"},
    "paired": set(),
    "comparing": {"answer_files", "paired", "store"},
    "measure": {
        "answer_files",
        "context",
        "data",
        "evaluation",
        "judging",
        "processes",
        "recipe_evaluation",
        "registry",
        "store",
        "tasks",
        "weights",
        "work",
    },
    "probe": {"data", "evaluation", "registry"},
    "report": {"paired", "store"},
    "tasks": set(),
    "weights": set(),
    "store": set(),
    "world": {"evaluation", "defenses", "seeds"},
    "processes": set(),
    "progress": set(),
    "seeds": set(),
    "errors": set(),
}
"""What each part may import beside itself and errors (the version is everybody's)."""
TYPES_ONLY = {("results", "steps"), ("registry", "defenses")}


def part(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "holdfast":
            names = (
                [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            )
            yield from names
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("holdfast."))


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_direction(path):
    mine = part(path)
    allowed = ALLOWED[mine] | {mine, "errors", "__version__"}
    assert set(imports(path)) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 360


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(' '.join(sys.modules), file=sys.stderr)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(done.stderr.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "pandas"}


@pytest.mark.parametrize(
    "code",
    [
        "import holdfast",
        "from holdfast import cli",
        "from holdfast import Recipe, plan, get_defense, list_defenses; list_defenses()",
        "import sys; sys.argv=['holdfast', 'list']; from holdfast.cli import app; app(standalone_mode=False)",
        "from holdfast import Recipe, plan; plan(Recipe.load('world'))",
    ],
)
def test_light_parts_import_nothing_heavy(code):
    assert not modules_after(code) & HEAVY


def test_the_public_names():
    assert holdfast.__all__ == [
        "Defense", "Recipe", "SafetyProbe", "__version__", "compare", "generate", "get_defense", "list_defenses",
        "mix", "moderate", "plan", "rate", "report", "run", "safe_lora", "score",
    ]  # fmt: skip
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None
    assert callable(holdfast.report), "also after the package of that name was imported"
    with pytest.raises(AttributeError):
        holdfast.nothing  # noqa: B018


def test_nothing_is_loaded_with_pickle_or_foreign_code():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text
        assert "trust_remote_code=True" not in text
        assert "torch.load(" not in text
