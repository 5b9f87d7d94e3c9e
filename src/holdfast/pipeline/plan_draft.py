"""A plan while it is built: the steps so far, and what the descriptions of all steps share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import InputError, about
from holdfast.machine.digests import Digests
from holdfast.machine.processes import launched
from holdfast.measuring import judging
from holdfast.pipeline import repairing
from holdfast.pipeline.chain import model_input
from holdfast.pipeline.step import Check, Code, Content, Made, Step, Work
from holdfast.pipeline.versions import ANSWERED_BY, packages
from holdfast.recipe import Recipe
from holdfast.recipe.evaluation import JudgeRecipe
from holdfast.recipe.stages import StageRecipe, with_decimals


class Draft:
    """A plan while it is built.

    Attributes:
        recipe: the recipe; during an attack sweep, that of the current point.
        at: text for titles that names the current point of an attack sweep; "" outside a sweep.
        steps: the steps so far, by id.
        elsewhere: the messages about inputs that are not on this machine.
        folder: the folder of the base model.
        model: the inputs of every step that reads the base model.
    """

    def __init__(
        self,
        recipe: Recipe,
        download: bool,
        digests: Digests,
        today: str,
        partial: bool,
        device: str,
        processes: Mapping[str, int] | None,
        known: dict[Any, Any] | None,
    ):
        from holdfast.weights.folders import find_model, model_path, writes_date

        self.download = download
        self.digests = digests
        self.known = {} if known is None else known
        self.processes = processes or dict.fromkeys(("alignment", "user"), launched().count)
        self.steps: dict[str, Step] = {}
        self.partial = partial
        self.elsewhere: dict[str, None] = {}
        path = str(model_path(recipe.model.path))
        self.folder = Path(path)
        with self.noted("model", "path"):
            self.folder = find_model(path, recipe.model.revision, download)
        dated = not recipe.model.template.startswith("alpaca") and writes_date(self.folder)
        date = (recipe.model.template_date or today) if dated else None
        model = recipe.model.model_copy(update={"template_date": date})
        self.recipe = recipe = recipe.model_copy(update={"model": model})
        self.at = ""
        described = repr(recipe.model), self.folder, device
        if described not in self.known:
            self.known[described] = model_input(recipe, self.folder, digests, device)
        self.model: dict[str, Any] = {"model": self.known[described], "template": recipe.model.template}

    @contextmanager
    def noted(self, *key: str) -> Iterator[None]:
        """In a partial plan, note an input that is not on this machine instead of raising its error.

        Other errors are about the recipe key `key`, unless they have one.
        """
        try:
            with about(*key):
                yield
        except InputError as error:
            if not (self.partial and error.elsewhere):
                raise
            self.elsewhere[str(error)] = None

    def add(
        self,
        kind: str,
        title: str,
        detail: str,
        inputs: Mapping[str, Any],
        work: Work,
        check: Check | None = None,
        together: bool = False,
    ) -> str:
        """Add a step, unless it is already there, and return its id."""
        if kind not in ("attack", "change", "filter"):  # which the points of an attack sweep share
            title += self.at
        step = Step(kind, title, detail, inputs, work, check, together)
        self.steps.setdefault(step.id, step)
        return step.id

    def model_after(self, weights: tuple[str, ...]) -> dict[str, Any]:
        """Return the base model with the weights of the steps `weights` on it, as inputs."""
        return {**self.model, "chain": [Made(step) for step in weights]}

    def base(self, stage: str) -> Path:
        """Return the folder of the model before alignment; in a partial plan, its name if it is elsewhere."""
        found = Path(getattr(self.recipe, stage).base or self.folder)
        with self.noted(stage, "base"):
            found = repairing.find_base(self.recipe, stage, self.folder, self.digests, self.download)
        return found

    def judge(self, judge: JudgeRecipe, *key: str) -> dict[str, Any]:
        """Return a judge as inputs: its settings, the content of its model, its code and its packages.

        Args:
            key: the recipe key of the judge, for errors.
        """
        with about(*key):
            if repr(judge) not in self.known:
                self.known[repr(judge)] = judging.judge_identity(judge, self.digests, self.download)
            content = self.known[repr(judge)]
            loads = judging.judge_folder(judge) is not None
        return {
            "judge": Content(judge, {**content, "code": Code("judges", judge.name)}),
            "packages": packages(ANSWERED_BY, judge.quantization) if loads else None,
        }


def parameters_of(part: StageRecipe) -> dict[str, Any]:
    """Return a method's own parameters, with their defaults."""
    return with_decimals(part.parameters(), registry.face("defenses", part.defense))
