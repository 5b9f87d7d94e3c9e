"""The block `post_hoc_attack` of a recipe: what an attacker does to the weights after the last stage."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast import registry
from holdfast.errors import RecipeError
from holdfast.recipe.model import Wrong
from holdfast.recipe.stages import check_parameter, with_decimals


class PostHocAttackRecipe(BaseModel):
    """An attack on the weights, by name (or your own file), and its own parameters. Nothing is trained.

    `harmful` and `harmless` are the sources of its prompts; by default `data.harmful` and the benign user
    rows. `prompts` is the largest number of prompts of each kind; 128 is the number of the paper of refusal
    ablation.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str
    harmful: str | None = None
    harmless: str | None = None
    prompts: int = Field(128, ge=1)

    @property
    def face(self) -> registry.Face:
        """The registry's entry of the attack."""
        return registry.face("attacks", self.name)

    @property
    def label(self) -> str:
        """The name of the attack in tables."""
        return str(self.face.facts.get("label", self.name))

    def parameters(self) -> dict[str, Any]:
        """The attack's parameters, with their defaults."""
        return with_decimals(self.model_extra or {}, self.face)

    @model_validator(mode="after")
    def _known(self) -> PostHocAttackRecipe:
        if not self.name.endswith(".py") and self.name not in registry.faces("attacks"):
            raise Wrong(["name"], registry.unknown("attacks", self.name))
        try:
            face = self.face
        except RecipeError as error:  # a file of the user's
            raise Wrong(["name"], str(error)) from None
        if "apply" not in face.code:
            raise Wrong(["name"], f"{self.name} changes rows, not weights; write it as data.attack")
        for name, value in (self.model_extra or {}).items():
            check_parameter([], face, name, value, PostHocAttackRecipe.model_fields)
        return self
