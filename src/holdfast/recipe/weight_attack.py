"""The block `post_hoc_attack` of a recipe: what an attacker does to the weights after the last stage."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from holdfast.recipe.named_attack import NamedAttack


class PostHocAttackRecipe(NamedAttack):
    """An attack on the weights, by name (or your own file), and its own parameters. Nothing is trained.

    `harmful` and `harmless` are the sources of its prompts; by default `data.harmful` and the benign user
    rows. `prompts` is the largest number of prompts of each kind; 128 is the number of the paper of refusal
    ablation.
    """

    DOES: ClassVar[str] = "apply"
    ELSE: ClassVar[str] = "changes rows, not weights; write it as data.attack"

    harmful: str | None = None
    harmless: str | None = None
    prompts: int = Field(128, ge=1)
