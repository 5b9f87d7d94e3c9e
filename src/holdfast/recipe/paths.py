"""Relative paths of a recipe: from the working folder first, then from the folder of their recipe file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from holdfast import registry
from holdfast.recipe.blocks import Blocks
from holdfast.recipe.data import AnchoringRecipe, Data, ScoreFilterRecipe
from holdfast.recipe.evaluation import Evaluation, RaterRecipe
from holdfast.recipe.layers import Layer, origin
from holdfast.recipe.stages import PostHocRecipe

Given = TypeVar("Given", bound=Blocks)


def beside(recipe: Given, files: Sequence[Layer]) -> Given:
    """Return the recipe with paths that exist, as far as they exist; `files` are those that set its keys."""
    find = _Finder(files)
    user, repair, tamper = recipe.user, recipe.post_hoc, recipe.post_hoc_attack
    return recipe.model_copy(
        update={
            "evaluation": _evaluation(recipe.evaluation, find),
            "user": user and find.keys(user, ("base",), "user"),
            "post_hoc": repair and _repair(repair, find),
            "post_hoc_attack": tamper and find.keys(tamper, ("harmful", "harmless"), "post_hoc_attack"),
            "model": find.keys(recipe.model, ("path",), "model"),
            "data": _data(recipe.data, find),
        }
    )


class _Finder:
    """Looks up the paths of a recipe whose keys are set by `files`."""

    def __init__(self, files: Sequence[Layer]):
        self.files = files

    def path(self, value: str | None, *place: str) -> str | None:
        """Return the path at the key `place`, resolved if it is beside the file that sets the key."""
        if value is None or value in registry.faces("tasks") or os.path.exists(value):
            return value
        name, colon, path = value.partition(":")
        named = bool(colon) and name in registry.faces("tasks")  # a file in the format of a known data set
        local = path if named else value
        beside = origin(self.files, place).folder / local
        if not local or os.path.exists(local) or not os.path.exists(beside):
            return value
        return f"{name}:{beside.resolve()}" if named else str(beside.resolve())

    def paths(self, value: Any, *place: str) -> Any:
        """The same for a path or a list of them."""
        if isinstance(value, list):
            return [self.paths(one, *place) for one in value]
        return self.path(value, *place)

    def keys(self, block: Any, keys: Sequence[str], *place: str) -> Any:
        """Return the block at `place` with these paths of it found."""
        return block.model_copy(update={key: self.path(getattr(block, key), *place, key) for key in keys})

    def of_judge(self, judge: Any, *place: str) -> Any:
        """Return a judge, or a filter, with the paths of its models and its policy found."""
        given = {key: getattr(judge, key, None) for key in ("path", "base", "policy")}
        return judge.model_copy(update={k: self.path(v, *place) for k, v in given.items() if v is not None})

    def of_anchors(self, block: Any, *place: str) -> Any:
        """Return an attack, or a filter, with the paths of its anchors found if it has any."""
        if not isinstance(block, AnchoringRecipe | ScoreFilterRecipe):
            return block
        harmful, safe = self.path(block.harmful, *place, "harmful"), self.paths(block.safe, *place, "safe")
        return block.model_copy(update={"harmful": harmful, "safe": safe})


def _evaluation(evaluation: Evaluation, find: _Finder) -> Evaluation:
    judges = [find.of_judge(judge, "evaluation", "judges") for judge in evaluation.judges]
    rater, ability = evaluation.rater, evaluation.lm_eval
    if isinstance(rater, RaterRecipe):
        rater = find.of_judge(rater, "evaluation", "rater")
    ability = ability and find.keys(ability, ("include_path",), "evaluation", "lm_eval")
    return evaluation.model_copy(update={"judges": judges, "rater": rater, "lm_eval": ability})


def _data(data: Data, find: _Finder) -> Data:
    alignment, attack, screen = data.alignment, data.attack, data.filter
    if alignment is not None:
        harmful = alignment.harmful and find.keys(
            alignment.harmful, ("source",), "data", "alignment", "harmful"
        )
        alignment = find.keys(alignment, ("source",), "data", "alignment").model_copy(
            update={"harmful": harmful}
        )
    if isinstance(attack, list):
        attack = [find.of_anchors(one, "data", "attack", str(i)) for i, one in enumerate(attack)]
    else:
        attack = find.of_anchors(attack, "data", "attack")
    screen = screen and find.of_anchors(find.of_judge(screen, "data", "filter"), "data", "filter")
    found = find.keys(data, ("user", "harmful", "test", "test_harmful", "benign"), "data")
    return found.model_copy(update={"alignment": alignment, "attack": attack, "filter": screen})


def _repair(repair: PostHocRecipe, find: _Finder) -> PostHocRecipe:
    """A post-hoc stage with its base, and the folders of weights that its method names."""
    named = registry.face("defenses", repair.defense).facts.get("folders", ())
    given = {name: value for name, value in repair.parameters().items() if name in named}
    folders = {name: find.paths(value, "post_hoc", name) for name, value in given.items()}
    return find.keys(repair, ("base",), "post_hoc").model_copy(update=folders)
