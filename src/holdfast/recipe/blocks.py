"""The blocks of a recipe, and what they say about each stage: its rows, its LoRA and what it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from holdfast import registry
from holdfast.recipe.attack_sweep import AttackSweep
from holdfast.recipe.data import Data
from holdfast.recipe.evaluation import Evaluation
from holdfast.recipe.model import NAMED, Lora, Model, Part, from_text, none_or_text
from holdfast.recipe.stages import PostHocRecipe, StageRecipe, as_stage
from holdfast.recipe.weight_attack import PostHocAttackRecipe

ROWS_NEEDED = {
    "alignment_dataset": ("alignment",),
    "harmful_dataset": ("harmful",),
    "harmful_adapter": ("harmful",),
    "refusal_adapter": ("alignment", "harmful"),
}
"""The roles of rows behind an input that a method needs; an adapter is trained on them."""


class Blocks(Part):
    """The blocks of one run: model, data, the stages, evaluation."""

    protocol: str | None = None
    name: str = Field("run", pattern=NAMED % 99)
    seed: int = Field(42, ge=0, lt=2**31)
    model: Annotated[Model, from_text("path")]
    data: Data
    alignment: Annotated[StageRecipe | None, BeforeValidator(as_stage)] = StageRecipe()
    user: Annotated[StageRecipe | None, BeforeValidator(as_stage)] = StageRecipe()
    post_hoc: Annotated[PostHocRecipe | None, BeforeValidator(as_stage)] = None
    post_hoc_attack: Annotated[PostHocAttackRecipe | None, none_or_text("name")] = None
    attack_sweep: Annotated[AttackSweep | None, none_or_text("points")] = None
    evaluation: Annotated[Evaluation, from_text("protocol")] = Field(default_factory=Evaluation)

    def needs(self, stage: str) -> tuple[str, ...]:
        """The inputs that a stage's defense needs beyond its own rows; empty if the stage does not run."""
        return self._declared(stage, "needs")

    def may_use(self, stage: str) -> tuple[str, ...]:
        """The inputs that a stage's defense also gets if the run has them."""
        return self._declared(stage, "optional")

    def reads(self, stage: str) -> set[str]:
        """The roles of the rows that a stage's defense needs beyond its own, "alignment" or "harmful"."""
        return {role for name in self.needs(stage) for role in ROWS_NEEDED.get(name, ())}

    def _declared(self, stage: str, fact: str) -> tuple[str, ...]:
        part: StageRecipe | PostHocRecipe | None = getattr(self, stage)
        return () if part is None else registry.face("defenses", part.defense).facts.get(fact, ())

    def lora(self, stage: str) -> Lora | None:
        """The LoRA of a stage, its own or the model's; None if all weights are trained."""
        own = getattr(self, stage).lora
        lora = self.model.lora if own is None else own
        return lora if isinstance(lora, Lora) else None

    def trains(self, stage: str) -> Literal["new", "continue", "full"]:
        """Return what a stage trains: a new adapter, the one before it, or all weights.

        A user stage with `adapter: continue` trains all weights if the alignment stage did. A post-hoc method
        that trains continues with what the user stage trained.
        """
        if stage == "post_hoc":
            return "full" if self.trains("user") == "full" else "continue"
        if stage == "user" and self.user_adapter() == "continue":
            return "continue" if self.lora("alignment") else "full"
        return "new" if self.lora(stage) else "full"

    def user_adapter(self) -> str:
        """The `adapter` of the user stage: set by the recipe, or the defense's default."""
        assert self.user is not None
        return self.user.adapter or registry.face("defenses", self.user.defense).facts.get("adapter", "new")
