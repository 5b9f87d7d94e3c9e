"""The stage blocks of a recipe: two training stages and the post-hoc stage.

A method's own parameters and the fields of `TrainingArguments` are checked by name through the registry,
without importing the method.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from holdfast import registry
from holdfast.errors import RecipeError, nearest
from holdfast.recipe.model import Keys, LoraOrNone, Wrong
from holdfast.recipe.reading import shorten

RESERVED_TRAINING = {
    "output_dir", "seed", "data_seed", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token",
    "remove_unused_columns", "do_train", "do_eval", "do_predict", "use_cpu", "disable_tqdm",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end",
    "eval_strategy", "eval_steps", "eval_on_start", "include_num_input_tokens_seen", "deepspeed", "fsdp",
    "fsdp_config",
}  # fmt: skip
"""Fields of TrainingArguments that the pipeline sets itself."""

TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""The trackers to which `training.report_to` can send the logs of a training."""
NOT_IDENTITY = {
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
}  # fmt: skip
"""Training arguments that affect only where the logs go; they are not part of a step's name."""

ALIGNMENT_TRAINING = {  # Lisa, arXiv 2405.18641, section 5.1; decay, schedule and warm-up from its code
    "learning_rate": 1e-3,
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 5,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
USER_TRAINING = {  # the same sources; 20 epochs for SST-2 and AG News, 50 for GSM8K
    "learning_rate": 1e-5,
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 5,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
}


POST_HOC_TRAINING = {  # the one-shot patch, arXiv 2601.01887: one batch of all its rows in each epoch
    "learning_rate": 2e-5,
    "num_train_epochs": 10.0,
    "per_device_train_batch_size": 8,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
}
TRAINING = {"alignment": ALIGNMENT_TRAINING, "user": USER_TRAINING, "post_hoc": POST_HOC_TRAINING}
"""The training arguments of each stage that a recipe does not set."""


class Training(Keys):
    """Fields of `TrainingArguments`, `max_length` and `lean_loss`; the range of common fields is checked."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    learning_rate: float | None = Field(None, gt=0)
    num_train_epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    per_device_train_batch_size: int | None = Field(None, ge=1)
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    weight_decay: float | None = Field(None, ge=0)
    warmup_steps: float | None = Field(None, ge=0)
    max_grad_norm: float | None = Field(None, ge=0)
    max_length: int | None = Field(None, ge=2)
    lean_loss: bool | None = None
    logging_steps: int | None = Field(None, ge=1)
    report_to: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _finite(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if not finite(value):
                raise Wrong([name], f"expected a finite number, found {value}")
        return given

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, given: Any) -> Any:
        """Read `warmup_ratio`, which is a fraction in `warmup_steps` since transformers 5."""
        if not isinstance(given, Mapping) or given.get("warmup_ratio") is None:
            return given
        ratio = given["warmup_ratio"]
        if given.get("warmup_steps") is not None:
            raise Wrong(["warmup_ratio"], "give warmup_steps alone; a fraction below 1 there means the same")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise Wrong(["warmup_ratio"], f"expected a share from 0 to below 1, found {shorten(ratio)}")
        return {**{k: v for k, v in given.items() if k != "warmup_ratio"}, "warmup_steps": ratio}

    @model_validator(mode="after")
    def _known(self) -> Training:
        known = set(registry.training_arguments()) | {"max_length"}
        for name in self.model_extra or {}:
            if name in RESERVED_TRAINING:
                raise Wrong([name], "the pipeline sets this itself; leave it out")
            if name == "loss_on":
                raise Wrong([name], "write data.loss_on, or data.alignment.loss_on for the alignment rows")
            if name not in known:
                raise Wrong([name], f"unknown training argument.{nearest(name, known)}")
        for tracker in trackers(self.report_to):
            if tracker not in TRACKERS:
                raise Wrong(["report_to"], f"unknown tracker '{tracker}'.{nearest(tracker, TRACKERS)}")
        return self

    def given(self) -> dict[str, Any]:
        """The fields that the recipe sets."""
        return {**self.model_dump(exclude_none=True)}


def finite(value: Any) -> bool:
    """Whether a value contains neither NaN nor infinity."""
    if isinstance(value, dict):
        return finite(list(value.values()))
    if isinstance(value, list | tuple):
        return all(finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers that `training.report_to` names; "none" names none."""
    named = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in named if name != "none"]


class StageRecipe(Keys):
    """A stage: the name of a defense, its own parameters, LoRA and training arguments.

    `adapter` says what the user stage trains: "new" (double LoRA: a new adapter), "continue" (single LoRA:
    the alignment adapter), or None (as in the defense's paper). `base` is the model before alignment, for a
    user stage whose method needs it in a run whose `model.path` is already aligned.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    defense: str = "sft"
    base: str | None = None
    adapter: Literal["new", "continue"] | None = None
    lora: LoraOrNone | None = None
    training: Training = Training()

    def parameters(self) -> dict[str, Any]:
        """The method's own parameters, as given."""
        return dict(self.model_extra or {})

    def as_sft(self) -> StageRecipe:
        """The same block for plain SFT."""
        return StageRecipe(defense="sft", adapter=self.adapter, lora=self.lora, training=self.training)

    def check(self, stage: str) -> None:
        """Raise Wrong if the defense is unknown, does not act at this stage, or has no such parameter."""
        face = _face(stage, self.defense)
        for name, value in self.parameters().items():
            check_parameter([stage], face, name, value, StageRecipe.model_fields)


class PostHocRecipe(Keys):
    """Repair after fine-tuning: the name of a method and its parameters; each value of a list is tried.

    `base` is the model before alignment, for a run whose `model.path` is already aligned. `training` is for a
    method that trains.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    defense: str
    base: str | None = None
    training: Training | None = None

    def parameters(self) -> dict[str, Any]:
        """The method's own parameters as given, including lists; the text `none` becomes None."""
        return {name: _null(value) for name, value in (self.model_extra or {}).items()}

    def combinations(self) -> list[dict[str, Any]]:
        """The parameters of each repair: all combinations of the values of lists."""
        given = self.parameters()
        values = [value if isinstance(value, list) else [value] for value in given.values()]
        return [dict(zip(given, chosen, strict=True)) for chosen in product(*values)]

    def swept(self) -> list[str]:
        """The parameters that are given as lists."""
        return [name for name, value in self.parameters().items() if isinstance(value, list)]

    def check(self) -> None:
        """Raise Wrong if the method is unknown, does not act here, or a parameter is not valid."""
        face = _face("post_hoc", self.defense)
        trains = "trainer" in face.code
        if self.training is not None and not trains:
            raise Wrong(["post_hoc", "training"], f"nothing is trained by {self.defense}; leave it out")
        for name, value in self.parameters().items():
            if name in StageRecipe.model_fields:
                text = (
                    "it trains the weights of the user stage"
                    if trains
                    else f"nothing is trained by {self.defense}"
                )
                raise Wrong(["post_hoc", name], f"{text}; leave it out")
            values = value if isinstance(value, list) else [value]
            for one in values or [value]:
                check_parameter(["post_hoc"], face, name, one, PostHocRecipe.model_fields)
            if any(one in values[:index] for index, one in enumerate(values)):
                raise Wrong(
                    ["post_hoc", name], f"a value appears twice in {shorten(value)}; give each value once"
                )
        one_of = face.facts.get("one_of", ())
        for combination in self.combinations() if one_of else ():
            given = [name for name in one_of if combination.get(name) is not None]
            if len(given) != 1:
                found = " and ".join(given) or "neither"
                text = f"{self.defense} needs exactly one of {' and '.join(one_of)}, found {found}"
                if self.swept() and given:
                    text += "; the values of several lists are all combined"
                raise Wrong(["post_hoc"], text)


def _null(value: Any) -> Any:
    if isinstance(value, list):
        return [_null(one) for one in value]
    return None if value == "none" else value


def _face(stage: str, defense: str) -> registry.Face:
    """The registry's entry of a defense. Raises Wrong if the defense does not act at `stage`."""
    known = registry.list_defenses(stage)
    if not defense.endswith(".py") and defense not in registry.faces("defenses"):
        raise Wrong([stage, "defense"], registry.unknown("defenses", defense, known))
    try:
        face = registry.face("defenses", defense)
    except RecipeError as error:  # a file of the user's
        raise Wrong([stage, "defense"], str(error)) from None
    if stage not in face.facts["stages"]:
        there = ", ".join(known) or "none yet"
        text = f"'{defense}' does not act at the {stage} stage. Defenses that do: {there}."
        raise Wrong([stage, "defense"], text)
    return face


def check_parameter(
    place: Sequence[str], face: registry.Face, name: str, value: Any, keys: Iterable[str]
) -> None:
    """Raise Wrong if a method or an attack has no parameter `name`, or the value does not fit.

    Args:
        place: the keys of the block that contains it.
        keys: the other keys of that block.
    """
    if name not in face.parameters:
        names = [*face.parameters, *keys]
        raise Wrong([*place, name], f"unknown parameter of {face.name}.{nearest(name, names)}")
    if not finite(value):
        raise Wrong([*place, name], f"expected a finite number, found {value}")
    if not _fits(value, face.parameters[name]):
        raise Wrong([*place, name], f"expected {face.parameters[name].type}, found {shorten(value)}")


def with_decimals(values: Mapping[str, Any], face: registry.Face) -> dict[str, Any]:
    """Return parameters with their defaults, in which 1 for a number with decimals is 1.0."""
    found = {name: known.default for name, known in face.parameters.items()} | dict(values)
    decimal = {name for name, known in face.parameters.items() if isinstance(known.default, float)}
    return {k: float(v) if k in decimal and type(v) is int else v for k, v in found.items()}


TYPES: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool, "int": int, "float": (int, float), "str": str, "None": type(None),
}  # fmt: skip


def _fits(value: Any, parameter: registry.Parameter) -> bool:
    """Whether a YAML value has the parameter's type (an int is accepted for a float)."""
    default = parameter.default
    if parameter.type.startswith("Literal["):
        return value in ast.literal_eval(f"({parameter.type[8:-1]},)")
    if default is None:
        names = [name.strip() for name in parameter.type.split("|")]
        if isinstance(value, bool):
            names = [name for name in names if name not in ("int", "float")]
        return any(isinstance(value, TYPES.get(name, object)) for name in names)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def as_stage(value: Any) -> Any:
    """Read `none` or null as a stage that does not run, and a bare string as the name of a defense."""
    if value is None or value == "none":
        return None
    return {"defense": value} if isinstance(value, str) else value
