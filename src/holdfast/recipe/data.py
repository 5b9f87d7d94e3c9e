"""The block `data` of a recipe: the source and the number of the rows of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    ConfigDict,
    Field,
    PlainValidator,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    model_serializer,
    model_validator,
)

from holdfast import registry
from holdfast.errors import nearest
from holdfast.machine.secrets import shown
from holdfast.recipe.evaluation import JudgeRecipe, cannot_filter
from holdfast.recipe.model import Part, Wrong, from_text, wording
from holdfast.recipe.named_attack import NamedAttack

COLUMNS = ("prompt", "completion", "instruction", "input", "output", "messages", "category")
"""The columns that a user's file can have, besides the columns of its task."""


class HarmfulData(Part):
    """Harmful rows for methods of the alignment stage; the default source is `data.harmful`."""

    source: str | None = None
    size: int | None = Field(None, ge=1)
    skip: int = Field(0, ge=0)


class AlignmentData(Part):
    """Rows of the alignment stage, and of the alignment state of BSO and Lisa.

    `loss_on` says which answers of a conversation are trained: all of them, or the last only.
    """

    source: str
    kind: Literal["safe", "refusal"] = "safe"
    size: int | None = Field(None, ge=1)
    skip: int = Field(0, ge=0)
    loss_on: Literal["all", "last"] = "all"
    harmful: Annotated[HarmfulData | None, from_text("source")] = None


ANCHORING = "bi_directional_anchoring"


class AttackRecipe(NamedAttack):
    """An attack that changes the user rows, by name (or your own file), and its own parameters."""

    DOES: ClassVar[str] = "change"
    ELSE: ClassVar[str] = "changes no rows; write it as post_hoc_attack"


class AnchoringRecipe(Part):
    """An attack with benign rows: fine-tuning uses only `size` of the user's rows, chosen to undo safety.

    Bi-directional anchoring, arXiv 2404.01099: the rows nearest to harmful anchors and farthest from safe
    anchors. Defaults are the paper's: the top 100 rows, by gradients, with 10 harmful anchors and two sets of
    10 safe anchors, whose answers are cut to 10 tokens. The default sources of the anchors are `data.harmful`
    and `data.alignment`. A list of safe sources gives one set for each.
    """

    name: Literal["bi_directional_anchoring"] = "bi_directional_anchoring"
    harmful: str | None = None
    safe: str | list[str] | None = None
    anchors: int = Field(10, ge=1)
    size: int = Field(100, ge=1)
    by: Literal["gradient", "lora_gradient", "representation"] = "gradient"
    tokens: int = Field(10, ge=1)


AttackBlock = AnchoringRecipe | AttackRecipe


def _attack(value: Any) -> AttackBlock:
    """Read one attack: its name, or a block with its name."""
    if isinstance(value, AnchoringRecipe | AttackRecipe):
        return value
    block = {"name": value} if isinstance(value, str) else value
    anchoring = isinstance(block, Mapping) and block.get("name") == ANCHORING
    return (AnchoringRecipe if anchoring else AttackRecipe).model_validate(block)


_SEVERAL: TypeAdapter[list[AttackBlock]] = TypeAdapter(list[Annotated[AttackBlock, PlainValidator(_attack)]])


def _attacks(value: Any, plain: Any) -> Any:
    """Read `data.attack`: nothing, one attack, or a list of them, which act in their order.

    The errors of a plain union would name more than the key.
    """
    if value is None or value == "none":
        return None
    return _SEVERAL.validate_python(value) if isinstance(value, list) else _attack(value)


class FilterRecipe(Part):
    """A judge that filters rows before fine-tuning (Lisa, arXiv 2405.18641, Table 12): it drops flagged rows.

    The judge's own keys are written beside its name, as in `evaluation.judges`. `unparsed` says what happens
    to a row for which the judge gives no verdict.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    judge: str
    unparsed: Literal["drop", "keep"] = "drop"

    @model_serializer(mode="wrap")
    def _without_password(self, plain: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        found = plain(self)
        if info.mode == "json" and isinstance(found.get("base_url"), str):
            found["base_url"] = shown(found["base_url"])
        return found

    @property
    def judge_recipe(self) -> JudgeRecipe:
        """The judge, in the form of the judges of the evaluation."""
        return JudgeRecipe.model_validate({**(self.model_extra or {}), "name": self.judge})

    @model_validator(mode="after")
    def _known(self) -> FilterRecipe:
        for key in {"name", "label"} & set(self.model_extra or {}):
            raise Wrong([key], f"unknown key; write judge: {self.judge}")
        try:
            _ = self.judge_recipe
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            place = [str(part) for part in first["loc"]] + getattr(cause, "place", [])
            if first["type"] == "extra_forbidden":
                names = [*FilterRecipe.model_fields, *JudgeRecipe.model_fields]
                raise Wrong(place, f"unknown key.{nearest(place[-1], names)}") from None
            text = str(cause) if cause else wording(first)
            raise Wrong(place, text) from None
        reason = cannot_filter(self.judge)
        if reason is not None:
            raise Wrong(["judge"], f"{reason}: filter: {{judge: beaver_dam}}")
        return self


class ScoreFilterRecipe(Part):
    """A score that filters rows which look harmless: rows with a high score are dropped before fine-tuning.

    The model from which the user stage starts scores the rows, by anchors from `harmful` and `safe`, which
    are `data.harmful` and `data.alignment` by default. `drop` is the share of rows to drop, 0.1 unless
    `threshold` gives the score above which rows are dropped. `by` is for `anchoring`, `layer` (from 1; -1 is
    the last) for `datashield`.
    """

    score: Literal["datashield", "anchoring"]
    harmful: str | None = None
    safe: str | list[str] | None = None
    anchors: int = Field(10, ge=1)
    by: Literal["representation", "gradient"] = "representation"
    layer: int = Field(-1, ge=-1)
    drop: float | None = Field(None, gt=0, lt=1)
    threshold: float | None = None

    @property
    def share(self) -> float | None:
        """The share of rows to drop; None if a threshold is given."""
        return 0.1 if self.drop is None and self.threshold is None else self.drop

    @model_validator(mode="after")
    def _one_limit(self) -> ScoreFilterRecipe:
        if self.drop is not None and self.threshold is not None:
            raise Wrong(["threshold"], "expected drop or threshold, found both")
        if self.by != "representation" and self.score != "anchoring":
            raise Wrong(["by"], f"{self.score} reads hidden states only; leave it out")
        if self.layer != -1 and self.score != "datashield":
            raise Wrong(["layer"], f"{self.score} reads the last layer only; leave it out")
        if self.layer == 0:
            raise Wrong(["layer"], "expected 1 to the number of layers, or -1 for the last, found 0")
        return self


SCORES = get_args(ScoreFilterRecipe.model_fields["score"].annotation)
"""The scores that can filter rows."""

FilterBlock = FilterRecipe | ScoreFilterRecipe


def _filter(value: Any, plain: Any) -> Any:
    """Read `data.filter`: nothing, a judge or a score, by its name or as a block."""
    if value is None or value == "none" or isinstance(value, FilterRecipe | ScoreFilterRecipe):
        return None if value == "none" else value
    block = {"judge": value} if isinstance(value, str) else value
    if isinstance(block, Mapping) and block.get("judge") in SCORES:
        block = {"score": block["judge"], **{k: v for k, v in block.items() if k != "judge"}}
    scored = isinstance(block, Mapping) and "score" in block
    return (ScoreFilterRecipe if scored else FilterRecipe).model_validate(block)


class Data(Part):
    """The sources of the rows: each is the name of a known data set, a file (`name:FILE` for a file in the
    format of a known data set), or a Hub id.

    `columns` maps our column names to those of the user's files, {ours: yours}; `grader` replaces the task's
    grader; `suffix` is a text after every question of the task; `system` is a text before every question of
    the user rows, the system message of a chat. `take: first` takes the first rows of each source for the
    training stages, in the order of the file and with duplicates, as the papers' code does; `skip` in the
    alignment blocks leaves out rows before them.
    `skip_bad` drops and counts the rows of any source that cannot be used. `loss_on` says which
    answers of a conversation in the user rows and the harmful rows are trained: all, or the last only.
    """

    task: str | None = None
    user: str | None = None
    harmful: str | None = None
    alignment: Annotated[AlignmentData | None, from_text("source")] = None
    test: str | None = None
    test_harmful: str | None = None
    benign: str | None = None
    size: int | None = Field(None, ge=1)
    poison_ratio: float = Field(0.0, ge=0, le=1)
    skip_bad: bool = False
    loss_on: Literal["all", "last"] = "all"
    columns: dict[str, str] | None = None
    grader: Literal["exact", "contains", "number", "rouge1", "judge"] | None = None
    suffix: str = ""
    system: str = ""
    take: Literal["drawn", "first"] = "drawn"
    attack: Annotated[AttackBlock | list[AttackBlock] | None, WrapValidator(_attacks)] = None
    filter: Annotated[FilterBlock | None, WrapValidator(_filter)] = None

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.task is None and self.user is None:
            raise ValueError("give data.task (a known task) or data.user (your own file)")
        if self.task is not None and self.task not in registry.faces("tasks"):
            raise Wrong(["task"], registry.unknown("tasks", self.task))
        if self.task is not None and registry.faces("tasks")[self.task].type == "SafetyData":
            text = f"{self.task} is not a task: use it as data.harmful, data.test_harmful, data.benign or "
            raise Wrong(["task"], f"{text}data.alignment, or as data.user to fine-tune on it")
        if self.poison_ratio > 0 and self.harmful is None:
            raise Wrong(["poison_ratio"], "a ratio above 0 needs data.harmful: the rows to mix in")
        anchorings = [one for one in self.attacks if isinstance(one, AnchoringRecipe)]
        if len(anchorings) > 1:
            raise Wrong(["attack"], f"{ANCHORING} appears twice; it selects rows once")
        for attack in anchorings:
            self._need_anchors(attack, "attack")
            self._check_anchoring(attack)
        if isinstance(self.filter, ScoreFilterRecipe):
            self._need_anchors(self.filter, "filter")
        skips = {
            "alignment.skip": self.alignment.skip if self.alignment else 0,
            "alignment.harmful.skip": self.alignment_skip(),
        }
        for key, skip in skips.items():
            if skip and self.take != "first":
                raise Wrong(key.split("."), "rows in a seeded order cannot be skipped; add data.take: first")
        facts = registry.faces("tasks")[self.task].facts if self.task else {}
        known = [*COLUMNS, *(name for columns in facts.get("columns", ()) for name in columns)]
        for ours in self.columns or ():
            if ours not in known:
                raise Wrong(
                    ["columns", ours],
                    f"unknown column; write our name, then yours (prompt: question).{nearest(ours, known)}",
                )
        return self

    def alignment_harmful(self) -> tuple[str | None, int | None]:
        """The source of the harmful rows for methods of the alignment stage, and their number (None: all)."""
        asked = (self.alignment and self.alignment.harmful) or HarmfulData()
        return asked.source or self.harmful, asked.size

    def alignment_skip(self) -> int:
        """The number of rows before the harmful rows for methods of the alignment stage."""
        return self.alignment.harmful.skip if self.alignment and self.alignment.harmful else 0

    @property
    def attacks(self) -> list[AttackBlock]:
        """The attacks on the user rows, in their order."""
        if self.attack is None:
            return []
        return self.attack if isinstance(self.attack, list) else [self.attack]

    def prompt_attacks(self) -> list[AttackRecipe]:
        """The attacks that also change the harmful prompts of the test."""
        return [a for a in self.attacks if isinstance(a, AttackRecipe) and "prompt" in a.face.code]

    def attack_training(self) -> dict[str, Any]:
        """The training arguments of the user stage that the attacks set."""
        found: dict[str, Any] = {}
        for attack in self.attacks:
            if isinstance(attack, AttackRecipe):
                values = attack.parameters()
                found |= {key: values[name] for key, name in attack.face.facts.get("training", {}).items()}
        return found

    def anchors(self, asked: AnchoringRecipe | ScoreFilterRecipe) -> tuple[str | None, list[str]]:
        """The source of the harmful anchors of an attack or a filter, and the sources of its safe anchors."""
        safe = self.alignment.source if self.alignment else None
        given = asked.safe or safe or []
        return asked.harmful or self.harmful, [given] if isinstance(given, str) else given

    def _need_anchors(self, asked: AnchoringRecipe | ScoreFilterRecipe, block: str) -> None:
        for kind, source, key in zip(
            ("harmful", "safe"), self.anchors(asked), ("harmful", "alignment"), strict=True
        ):
            if not source:
                raise Wrong([block, kind], f"give a file of {kind} anchors here, or as data.{key}")

    def _check_anchoring(self, attack: AnchoringRecipe) -> None:
        if self.poison_ratio > 0:
            text = f"{attack.name} fine-tunes on benign rows only; set poison_ratio: 0"
            raise Wrong(["poison_ratio"], text)
        if self.size is not None and self.size < attack.size:
            raise Wrong(
                ["attack", "size"], f"{attack.size} rows cannot be chosen from data.size: {self.size}"
            )
