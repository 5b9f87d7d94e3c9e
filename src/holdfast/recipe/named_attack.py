"""An attack in a recipe: its name, or a file of the user's, and its own parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, model_validator

from holdfast import registry
from holdfast.errors import RecipeError
from holdfast.recipe.model import Keys, Wrong
from holdfast.recipe.stages import check_parameter, with_decimals


class NamedAttack(Keys):
    """An attack by name. A subclass says what its attacks do, and what to write for other ones."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    DOES: ClassVar[str]
    ELSE: ClassVar[str]

    name: str

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
    def _known(self) -> NamedAttack:
        if not self.name.endswith(".py") and self.name not in registry.faces("attacks"):
            raise Wrong(["name"], registry.unknown("attacks", self.name))
        try:
            face = self.face
        except RecipeError as error:  # a file of the user's
            raise Wrong(["name"], str(error)) from None
        if self.DOES not in face.code:
            raise Wrong(["name"], f"{self.name} {self.ELSE}")
        for name, value in (self.model_extra or {}).items():
            check_parameter([], face, name, value, type(self).model_fields)
        return self
