"""What a user may write: recipes, checked and frozen; unknown keys are refused."""

from __future__ import annotations

from holdfast.recipe.recipe import Recipe

__all__ = [
    "Recipe",
    "data",
    "evaluation",
    "layers",
    "model",
    "packaged",
    "protocols",
    "reading",
    "stages",
]
