"""Recipes: what a user can write, validated and frozen; unknown keys are errors."""

from __future__ import annotations

from holdfast.recipe.recipe import Recipe

__all__ = [
    "Recipe",
    "attack_sweep",
    "data",
    "evaluation",
    "layers",
    "model",
    "packaged",
    "reading",
    "stages",
    "weight_attack",
]
