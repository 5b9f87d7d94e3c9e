"""The blocks `model` and `lora` of a recipe: the model, and which of its weights are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from holdfast.errors import RecipeError, nearest
from holdfast.recipe.reading import shorten
from holdfast.weights.adapter import MUTATING

FULL = "none"
"""`lora: none` trains all weights."""


class Wrong(ValueError):
    """An error at a key below the block that reports it."""

    def __init__(self, place: Sequence[str], text: str):
        super().__init__(text)
        self.place = list(place)


class Keys(BaseModel):
    """The keys of a block of a recipe. A truth value is no number: pydantic would read `true` as 1."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        found = [one for one in _values(value) if isinstance(one, bool)]
        if found and kinds & {int, float} and not kinds & {bool, True, False}:
            raise ValueError(f"expected a number, found {str(found[0]).lower()}")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types and the literal values of which an annotation consists."""
    parts = get_args(annotation)
    for part in parts:
        yield from _kinds(part)
    if not parts:
        yield annotation


def _values(value: Any) -> Iterator[Any]:
    """Yield a value, or the values in a list or a mapping."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    yield from [value] if parts is None else parts


class Part(Keys):
    """A block of a recipe; it is frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Block = TypeVar("Block", bound=Part)


def from_text(key: str) -> BeforeValidator:
    """A validator that reads a bare string as `{key: string}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def none_or_text(key: str) -> BeforeValidator:
    """The same, for a block that `none` leaves out."""

    def read(value: Any) -> Any:
        return None if value == "none" else {key: value} if isinstance(value, str) else value

    return BeforeValidator(read)


Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[int | float, Field(gt=0)]


class Lora(Part):
    """A PEFT LoRA; the defaults are those of Lisa's user stage (rank 8, alpha 4, dropout 0.1, q and v)."""

    r: Rank = 8
    alpha: Alpha = 4
    dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "pissa", "olora"] = True
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Alpha] = {}
    exclude_modules: list[str] | str | None = None

    @model_validator(mode="after")
    def _possible(self) -> Lora:
        init = self.init_lora_weights
        if init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise Wrong(["r"], "init_lora_weights: orthogonal needs an even rank")
        if init in MUTATING and self.use_dora:
            raise Wrong(["use_dora"], f"init_lora_weights: {init} becomes a plain LoRA; leave out use_dora")
        if init in MUTATING and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            text = f"with init_lora_weights: {init}, leave out rank_pattern and alpha_pattern, or use_rslora"
            raise Wrong(["use_rslora"], text)
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that define the adapter; options added in later versions only if they are used."""
        first = ("r", "alpha", "dropout", "target_modules", "use_rslora")
        defaults = {name: field.default for name, field in Lora.model_fields.items()}
        return {k: v for k, v in self.model_dump().items() if k in first or v != defaults[k]}


def block(kind: type[Block], given: Any, place: str, key: str | None = None) -> Block:
    """A block of a recipe from Python: the block itself, a mapping of its keys, or the value of `key` alone.

    Args:
        place: the name of the argument, for the error; "" for none.

    Raises:
        RecipeError: a key that the block does not have, or a value that it refuses.
    """
    if isinstance(given, kind):
        return given
    if key is not None and isinstance(given, str | Path):
        given = {key: str(given)}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([*filter(None, [place]), *map(str, first["loc"])])
        known = (
            nearest(str(first["loc"][-1]), kind.model_fields) if first["type"] == "extra_forbidden" else ""
        )
        cause = first.get("ctx", {}).get("error")
        where = ".".join([*filter(None, [where]), *getattr(cause, "place", [])])
        text = "unknown key." if known else str(cause) if cause else wording(first)
        raise RecipeError(f"{where}: {text}{known}" if where else f"{text}{known}") from None


NAMED = r"^[A-Za-z0-9][A-Za-z0-9._+ -]{0,%d}$"
"""The pattern of a name that also names a folder or a column, with its greatest length less one."""

WORDINGS = {
    "model_type": "expected a block of keys (key: value)",
    "dict_type": "expected a block of keys (key: value)",
    "list_type": "expected a list",
    "too_short": "expected a list that is not empty",
    "string_too_short": "expected a text that is not empty",
}
"""What was expected, by the type of an error for which pydantic names its own classes or none."""


def wording(problem: Mapping[str, Any]) -> str:
    """Return what a validation error of pydantic expected, and what it found."""
    text = WORDINGS.get(problem["type"], problem["msg"][:1].lower() + problem["msg"][1:])
    if problem["type"] == "string_pattern_mismatch":
        most = int(problem["ctx"]["pattern"].rpartition(",")[2].rstrip("}$")) + 1
        letters = "letters from A to Z, digits, spaces and . _ + -"
        text = f"expected at most {most} {letters}, beginning with a letter or a digit"
    return f"{text}, found {shorten(problem['input'])}"


def or_none(value: Any, block: Any) -> Any:
    """Keep the text `none`; validate anything else as a block."""
    return FULL if value == FULL else block(value)


def plain(value: Any) -> Any:
    """The value in the form of a recipe: the text, or the block as plain values."""
    return value if isinstance(value, str) else value.model_dump(mode="json")


LoraOrNone = Annotated[Lora, WrapValidator(or_none), PlainSerializer(plain)]
"""A block, or the text `none`; it is not a union, because a union's errors name more than the key."""


def _date(value: Any) -> Any:
    """Read a date in YAML or in text as text. Raises ValueError if it is another value."""
    try:
        return value if value is None else date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"expected a date such as 2026-03-01, found {str(value)[:40]!r}") from None


class Weights(Part):
    """A model and how it is loaded: a folder, a Hub id, "world" (embedded) or "smollm2" (the lab model).

    `template_date` is the date that a chat template writes which would write today's date.
    """

    path: str
    revision: str | None = None
    template: Literal["auto", "alpaca", "alpaca_newline", "chat"] = "auto"
    template_date: Annotated[str | None, BeforeValidator(_date)] = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Annotated[
        Literal["nf4", "int8"] | None, BeforeValidator(lambda v: None if v == "none" else v)
    ] = None
    adapters: Literal["stack", "merge"] = "stack"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Weights:
        if self.quantization and self.adapters == "merge":
            text = f"merging would round the weights to {self.quantization} again; write adapters: stack"
            raise Wrong(["adapters"], text)
        return self


class Model(Weights):
    """The model that a run starts from, and which of its weights the stages train."""

    lora: LoraOrNone = Lora()
