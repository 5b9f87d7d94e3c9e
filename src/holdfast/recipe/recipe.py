"""A recipe: the description of one run, checked before anything starts.

YAML is read into frozen objects. An unknown key is an error with its line and the nearest known key; a bare
path works wherever a model or a data set is named. Nothing here imports torch: a method's own parameters and
the fields of `TrainingArguments` are checked by name through the registry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError, model_validator

from holdfast import registry
from holdfast.errors import RecipeError
from holdfast.machine.store import identity_hash
from holdfast.recipe import combinations, layers, named
from holdfast.recipe.attack_sweep import AttackPoint
from holdfast.recipe.blocks import Blocks
from holdfast.recipe.paths import beside
from holdfast.recipe.stages import TRAINING, PostHocRecipe, StageRecipe


class Recipe(Blocks):
    """One run: model, data, the stages, evaluation. See docs/recipes.md."""

    _origin: layers.Origin = PrivateAttr(default_factory=layers.Origin)

    @model_validator(mode="after")
    def _checked(self) -> Recipe:
        combinations.check(self)
        return self

    def at(self, point: AttackPoint) -> Recipe:
        """Return the recipe with the user stage of one point of the attack sweep.

        Another rank keeps alpha / r, so that the learning rate means the same.
        """
        assert self.user is not None
        training: dict[str, Any] = {}
        if point.learning_rate is not None:
            training["learning_rate"] = point.learning_rate
        if point.steps is not None:
            training["max_steps"] = point.steps
        if point.epochs is not None:
            training |= {"num_train_epochs": point.epochs, "max_steps": None}
        update: dict[str, Any] = {"training": self.user.training.model_copy(update=training)}
        lora = self.lora("user") if point.rank is not None else None
        if lora is not None and point.rank is not None:
            alpha = lora.alpha * point.rank / lora.r
            alpha = int(alpha) if isinstance(lora.alpha, int) and alpha == int(alpha) else alpha
            update["lora"] = lora.model_copy(update={"r": point.rank, "alpha": alpha})
        return self.model_copy(update={"user": self.user.model_copy(update=update)})

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """Load a recipe from a file, a packaged recipe's name, or a mapping; `overrides` are "key=value".

        Raises:
            RecipeError: the recipe is not valid; the message has file, line, key and what was expected.
        """
        stem = None if isinstance(source, Mapping) else Path(source).stem
        return cls.of_layers(layers.layers(source), stem, overrides)

    @classmethod
    def of_layers(cls, files: list[layers.Layer], stem: str | None, overrides: Sequence[str] = ()) -> Recipe:
        """Make a recipe of files that were read; `stem` is its name if no file gives one.

        Raises:
            RecipeError: the recipe is not valid.
        """
        keys = {*StageRecipe.model_fields, *PostHocRecipe.model_fields}
        raw = layers.merged(files, keys, stem)
        raw = layers.overridden(raw, overrides, keys)
        if raw.get("protocol") is not None:
            line = files[0].holds(["protocol"])[1]
            where = f"{files[0].name}, line {line}: protocol" if line else "protocol"
            raw["protocol"] = named.known(raw["protocol"], where)
            below, raw = named.below(raw["protocol"], raw, keys)
            files = [*files, *below]
            if stem is not None:
                raw.setdefault("name", stem)
        layers.finite(raw, (), files)
        raw = layers.own_files(raw, files)
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(layers.explain(error, files, cls, overrides)) from None
        recipe = beside(recipe, files)
        recipe._origin = layers.Origin(files)
        return recipe

    def named(self, name: str) -> Recipe:
        """Return the recipe with another name."""
        return self.model_copy(update={"name": name})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, including defaults, as stored with results."""
        return self.model_dump(mode="json")

    def changes(self) -> dict[str, Any]:
        """The keys in which the recipe differs from its protocol, with their values; {} without a protocol.

        Choices within the protocol (the methods, the task, the name) are not changes.
        """
        if self.protocol is None:
            return {}
        mine = self.to_dict()
        for made in named.references(mine):
            with contextlib.suppress(RecipeError):
                return named.differences(mine, Recipe.load(made).to_dict())
        return {}

    def whole(self) -> dict[str, Any]:
        """The recipe as plain values, with every default of its methods and trainings written out."""
        found = self.to_dict()
        for stage in ("alignment", "user"):
            part: StageRecipe | None = getattr(self, stage)
            defaults = TRAINING[stage]
            if part is not None:
                method = {k: p.default for k, p in registry.face("defenses", part.defense).parameters.items()}
                found[stage] |= method | part.parameters()
                found[stage]["training"] = {**defaults, **part.training.given()}
                if stage == "user":
                    found[stage]["training"] |= self.data.attack_training()
        if self.post_hoc is not None:
            known = registry.face("defenses", self.post_hoc.defense).parameters
            method = {k: p.default for k, p in known.items() if k != "seed"}  # the default is the run's
            found["post_hoc"] |= method | self.post_hoc.parameters()
            if "trainer" in registry.face("defenses", self.post_hoc.defense).code:
                own = self.post_hoc.training
                found["post_hoc"]["training"] = {**TRAINING["post_hoc"], **(own.given() if own else {})}
        if self.post_hoc_attack is not None:
            found["post_hoc_attack"] |= self.post_hoc_attack.parameters()
        return found

    def where(self, key: Sequence[str]) -> str:
        """Return the file and line that set a key, as in "my.yaml, line 7"; "" if no file does."""
        return self._origin.line(key)

    def fingerprint(self) -> str:
        """Twelve hex digits of the hash of the whole recipe."""
        return identity_hash(self.to_dict())
