"""The packaged grids: each file of `studies/` is a grid, whose name is that of the file.

The grids of published tables (`holdfast.study.tables`) have the names of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError, nearest
from holdfast.recipe import packaged
from holdfast.study import published, tables

FOLDER = Path(__file__).parent.parent / "studies"


def grids() -> dict[str, Path]:
    """Return the file of each packaged grid, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def about(path: Path) -> str:
    """Return the description of a packaged grid, which is the comment in its first line."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


def find(source: str | Path | Mapping[str, Any]) -> str | Path | Mapping[str, Any]:
    """Return the file of a packaged grid or the grid of a table if `source` names one, else `source` itself.

    A file of that name in the working folder comes first, as for recipes.

    Raises:
        RecipeError: `source` looks like a misspelt name of a packaged grid, or names a table without a grid.
    """
    if isinstance(source, Mapping) or len(Path(source).parts) > 1 or Path(source).is_file():
        return source
    name, known, recipes = str(source), grids(), packaged.recipes()
    if name in known or name in recipes:
        return known.get(name, source)
    if name in published.names():
        return tables.grid(name)
    own = [*known, *published.names()]
    hint = nearest(name, [*own, *recipes])
    if any(f"'{grid}'" in hint for grid in own):
        raise RecipeError(f"No such grid: {name}.{hint}")
    return known.get(name, source)
