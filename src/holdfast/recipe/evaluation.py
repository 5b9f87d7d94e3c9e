"""The block `evaluation` of a recipe: the prompts and the decoding, the judges, and the rater."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WrapValidator, model_validator

from holdfast import registry
from holdfast.errors import RecipeError, nearest
from holdfast.machine.secrets import shown
from holdfast.recipe import packaged
from holdfast.recipe.model import NAMED, Part, Wrong, from_text, or_none, plain

Text = Annotated[str, Field(min_length=1)]

Address = Annotated[str, PlainSerializer(shown, when_used="json-unless-none")]
"""The address of a server. A password in it is not written to files."""


class JudgeRecipe(Part):
    """A judge, given by name (or by your own file), with its model and its options.

    `label` is its name in the results, for a judge that is used twice with different options.
    """

    name: str
    label: str | None = Field(None, pattern=NAMED % 39)
    path: Text | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    max_length: int | None = Field(None, ge=8)
    quantization: Literal["nf4", "int8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    base: Text | None = None
    model: Text | None = None
    base_url: Address | None = None
    policy: Text | None = None
    requests_per_minute: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_calls: int | None = Field(None, ge=1)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)

    @property
    def shown(self) -> str:
        """Its name in the results; for a file of your own, without its folder."""
        return self.label or (Path(self.name).name if self.name.endswith(".py") else self.name)

    def options(self) -> dict[str, Any]:
        """The given options other than name, label, path, threshold and length."""
        common = {"name", "label", "path", "threshold", "max_length"}
        return {k: v for k, v in self.model_dump().items() if k not in common and v is not None}

    @model_validator(mode="after")
    def _known(self) -> JudgeRecipe:
        try:
            facts = registry.face("judges", self.name).facts
        except RecipeError as error:
            raise ValueError(str(error).replace("Unknown", "unknown", 1)) from None
        self._check_kind(facts)
        if facts.get("needs_path") and self.path is None:
            raise ValueError(f"judge {self.name} needs a model: write {{name: {self.name}, path: FOLDER}}")
        for key in facts.get("needs", ()):
            if getattr(self, key) is None:
                raise ValueError(f"judge {self.name} needs {key}: write {{name: {self.name}, {key}: ...}}")
        for key in self.options():
            if key not in facts.get("options", ()):
                raise self._no_option(key, ["path", "threshold", "max_length", *facts.get("options", ())])
        return self

    def _no_option(self, key: str, known: Sequence[str]) -> Wrong:
        takes = ", ".join(known) or "nothing"
        return Wrong([key], f"judge {self.name} has no such option; it takes {takes}")

    def _check_kind(self, facts: Mapping[str, Any]) -> None:
        if facts.get("measures", "harm") != "harm":
            text = "grades how good an answer is and gives no verdict on harm; use it as evaluation.rater"
            raise ValueError(f"judge {self.name} {text}")


class RaterRecipe(JudgeRecipe):
    """A judge that grades how good the answers to the task are (`alpaca_eval`, `mt_bench`)."""

    def _check_kind(self, facts: Mapping[str, Any]) -> None:
        if facts.get("measures", "harm") != "quality":
            raise ValueError(
                f"judge {self.name} gives verdicts on harm and does not rate answers; expected a rater: "
                f"{', '.join(raters())}"
            )
        known = facts.get("options", ())
        for key in RaterRecipe.model_fields:
            if key != "name" and getattr(self, key) is not None and key not in known:
                raise self._no_option(key, known)


def cannot_filter(judge: str) -> str | None:
    """Why a judge cannot filter training rows; None if it can."""
    if not registry.face("judges", judge).facts.get("refusals"):
        return None
    return (
        f"judge {judge} looks for refusals and calls every other answer harmful, so it would keep only the "
        "refusals. Use a judge that reads the answers"
    )


def raters(metric: str | None = None) -> list[str]:
    """The known judges that rate answers, or only those that measure `metric`."""
    facts = {name: face.facts for name, face in registry.faces("judges").items()}
    return [
        name
        for name, known in facts.items()
        if known.get("measures") == "quality" and metric in (None, known.get("metric"))
    ]


RaterOrNone = Annotated[RaterRecipe, from_text("name"), WrapValidator(or_none), PlainSerializer(plain)]
"""A block, a name, or the text `none`, which leaves the score of a judged task "not measured"."""


LEAST = 1e-6
"""The smallest temperature above 0; the logits are divided by it and have to stay finite."""


class Decoding(Part):
    """How prompts are answered; the default is Lisa's: 512 new tokens.

    `system` is a text before every question. `task_new_tokens` replaces the task's own number of new tokens.
    At temperature 0 decoding is greedy; above 0 it samples from the share `top_p` of the probability.
    `batch_tokens` counts the prompt and new tokens of one batch, padding included.
    """

    max_new_tokens: int = Field(512, ge=1)
    task_new_tokens: int | None = Field(None, ge=1)
    system: str = ""
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    batch_tokens: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _sampled(self) -> Decoding:
        if 0 < self.temperature < LEAST:
            text = f"expected 0 (greedy) or at least {LEAST:g}, found {self.temperature:g}"
            raise Wrong(["temperature"], text)
        if self.top_p < 1 and self.temperature == 0:
            raise Wrong(
                ["top_p"], "greedy decoding (temperature 0) has no top_p; set temperature, or leave it out"
            )
        return self


class Endpoint(Part):
    """An OpenAI-compatible server (".../v1") that answers prompts, several `requests` at the same time.

    `timeout` is the limit of one whole call in seconds.
    """

    base_url: Address
    requests: int = Field(8, ge=1)
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)


class LmEval(Part):
    """Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), by their names.

    `limit` is the number of questions of each task, and `num_fewshot` replaces the tasks' own number of
    examples. `include_path` is a folder with tasks of your own as YAML files.
    """

    tasks: list[Text] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    batch_size: int = Field(8, ge=1)
    include_path: str | None = None


def _tasks(value: Any) -> Any:
    """Read a name or a list of names as `{tasks: [...]}`; `none` leaves the block out."""
    if value == "none":
        return None
    names = [value] if isinstance(value, str) else value
    return {"tasks": names} if isinstance(names, list) else value


class Evaluation(Decoding):
    """The prompts, the decoding and the judges; defaults are Lisa's: 1000 prompts, 512 new tokens.

    `protocol` names a protocol whose block `evaluation` replaces the defaults. `rater` grades the answers to
    a task that only a judge can grade. `system` is a text before every question, after the text that a method
    of the user stage adds. Sampling uses the recipe's seed. A judge that leaves a larger share of the answers
    unparsed than `max_unparsed` has failed.
    `lm_eval` also measures general ability on tasks of lm-evaluation-harness.
    `attacked: true` asks the harmful prompts as the attacks of `data.attack` do, for example with a trigger.
    `take: first` tests on the first rows of the test files, in their order and with duplicates.
    """

    protocol: Text | None = None
    judges: list[Annotated[JudgeRecipe, from_text("name")]] = Field(
        default_factory=lambda: [JudgeRecipe(name="keyword")]
    )
    rater: RaterOrNone | None = None
    lm_eval: Annotated[LmEval | None, BeforeValidator(_tasks)] = None
    max_unparsed: float = Field(0.05, ge=0, le=1)
    prompts: int = Field(1000, ge=1)
    mixed_prompts: bool = False
    task_rows: int | None = Field(None, ge=1)
    take: Literal["drawn", "first"] = "drawn"
    attacked: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        name = given.get("protocol") if isinstance(given, Mapping) else None
        if not name:
            return given
        asked = packaged.ALIASES.get(str(name), str(name))
        if asked not in packaged.protocols():
            raise Wrong(["protocol"], f"unknown protocol '{name}'.{nearest(str(name), packaged.names())}")
        return {**packaged.evaluation(asked), **given}

    @model_validator(mode="after")
    def _distinct(self) -> Evaluation:
        if not self.judges:
            raise Wrong(["judges"], "expected at least one judge")
        for name, count in Counter(judge.shown for judge in self.judges).items():
            if count > 1:
                text = f"{name} appears twice; give one a label, so that the results can distinguish them: "
                raise Wrong(["judges"], f"{text}{{name: {name}, label: second, ...}}")
        return self

    @property
    def raters(self) -> list[RaterRecipe]:
        """The rater, if one is given, as a list."""
        return [self.rater] if isinstance(self.rater, RaterRecipe) else []
