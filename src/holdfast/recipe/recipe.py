"""A recipe: the description of one run, checked before anything starts.

YAML is read into frozen objects. An unknown key is an error with its line and the nearest known key; a bare
path works wherever a model or a data set is named. Nothing here imports torch: a method's own parameters and
the fields of `TrainingArguments` are checked by name through the registry.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from holdfast import registry
from holdfast.errors import RecipeError
from holdfast.machine.store import identity_hash
from holdfast.recipe import layers, named
from holdfast.recipe.attack_sweep import AttackPoint, AttackSweep
from holdfast.recipe.data import AnchoringRecipe, Data, ScoreFilterRecipe
from holdfast.recipe.evaluation import Evaluation
from holdfast.recipe.model import FULL, NAMED, Lora, Model, Part, Wrong, from_text, none_or_text
from holdfast.recipe.stages import TRAINING, PostHocRecipe, StageRecipe, as_stage
from holdfast.recipe.weight_attack import PostHocAttackRecipe
from holdfast.weights.adapter import MUTATING

ROWS_NEEDED = {
    "alignment_dataset": ("alignment",),
    "harmful_dataset": ("harmful",),
    "harmful_adapter": ("harmful",),
    "refusal_adapter": ("alignment", "harmful"),
}
"""The roles of rows behind an input that a method needs; an adapter is trained on them."""


class Recipe(Part):
    """One run: model, data, the stages, evaluation. See docs/recipes.md."""

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

    _origin: layers.Origin = PrivateAttr(default_factory=layers.Origin)

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        for name in ("alignment", "user"):
            stage: StageRecipe | None = getattr(self, name)
            if stage is None:
                continue
            stage.check(name)
            self._need_rows(name)
        if self.alignment is not None:
            self._need_alignment_data("the alignment stage")
        self._check_user_data()
        self._check_adapter()
        self._check_weights()
        if self.post_hoc is not None:
            self.post_hoc.check()
        self._check_bases()
        if self.post_hoc is not None:
            self._check_post_hoc(self.post_hoc)
        if self.post_hoc_attack is not None:
            self._check_post_hoc_attack(self.post_hoc_attack)
        if self.attack_sweep is not None:
            self._check_attack_sweep(self.attack_sweep)
        return self

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
        if stage == "user" and self._adapter() == "continue":
            return "continue" if self.lora("alignment") else "full"
        return "new" if self.lora(stage) else "full"

    def _adapter(self) -> str:
        """The `adapter` of the user stage: set by the recipe, or the defense's default."""
        assert self.user is not None
        return self.user.adapter or registry.face("defenses", self.user.defense).facts.get("adapter", "new")

    def _check_user_data(self) -> None:
        """An attack or a filter needs a user stage; an attack needs a gradient that can be computed."""
        for name in ("attack", "filter"):
            if getattr(self.data, name) is not None and self.user is None:
                raise Wrong(["data", name], "this acts on the rows of the user stage, but user is none")
        for attack in self.data.attacks:
            by = attack.by if isinstance(attack, AnchoringRecipe) else None
            if by == "gradient" and self.model.quantization:
                text = f"{self.model.quantization} weights have no gradient; "
                raise Wrong(["data", "attack", "by"], f"{text}write lora_gradient or representation")
            if by == "lora_gradient" and self.trains("user") == "full":
                raise Wrong(["data", "attack", "by"], "the user stage trains all weights; write gradient")
        screen = self.data.filter
        if isinstance(screen, ScoreFilterRecipe) and screen.by == "gradient" and self.model.quantization:
            text = f"{self.model.quantization} weights have no gradient; write representation"
            raise Wrong(["data", "filter", "by"], text)
        if self.evaluation.attacked and not self.data.prompt_attacks():
            text = "no attack of data.attack changes a question of the test; leave this out, or add one"
            raise Wrong(["evaluation", "attacked"], text)
        epochs = self.data.attack_training().get("num_train_epochs")
        if self.user is not None and epochs is not None and self.user.training.max_steps is not None:
            text = f"data.attack sets {epochs:g} epochs, which max_steps would replace; leave it out"
            raise Wrong(["user", "training", "max_steps"], text)

    def _check_adapter(self) -> None:
        """Single LoRA needs the alignment stage's adapter, and takes no LoRA settings of its own."""
        if self.alignment is not None and self.alignment.adapter is not None:
            raise Wrong(["alignment", "adapter"], "only the user stage has this key; leave it out")
        if self.user is None or self._adapter() == "new":
            return
        who = f"{self.user.defense} continues to train the alignment stage's adapter (adapter: continue)"
        if self.alignment is None:
            raise Wrong(["user", "adapter"], f"{who}, but alignment is none. Write user.adapter: new")
        if self.user.lora is not None:
            raise Wrong(
                ["user", "lora"],
                f"{who}, so this block would be ignored. Write lora: null, or adapter: new",
            )

    def _check_weights(self) -> None:
        """Refuse combinations of LoRA, quantisation and stacking that would not do what their names say."""
        bits = self.model.quantization
        for name in ("alignment", "user"):
            if getattr(self, name) is None:
                continue
            buffered = "harmful_adapter" in self.needs(name)
            if buffered and self.trains(name) != "new":
                text = "the adapter below is taken away afterwards, which needs a new LoRA above it"
                raise Wrong([name], f"{getattr(self, name).defense}: {text}")
            if self.trains(name) == "continue":
                continue
            lora = self.lora(name)
            place = ["model", "lora"] if getattr(self, name).lora is None else [name, "lora"]
            code = registry.face("defenses", getattr(self, name).defense).code
            if lora and lora.use_dora and "apply" in code:
                text = "the method changes updates B A, but DoRA also scales the weights; leave one out"
                raise Wrong([*place, "use_dora"], text)
            if bits and lora is None:
                raise Wrong(
                    place, f"{FULL} trains all weights, but {bits} weights cannot be trained; use LoRA"
                )
            if bits and lora and lora.init_lora_weights in MUTATING:
                text = f"{lora.init_lora_weights} changes the base weights, which {bits} would round again"
                raise Wrong([*place, "init_lora_weights"], text)
            if bits == "int8" and lora and lora.use_dora:
                raise Wrong([*place, "use_dora"], "DoRA does not run on int8 weights; use quantization: nf4")
            aligned = self.alignment is not None and self.trains("alignment") == "new"
            stacked = name == "user" and (aligned or buffered)
            if lora and lora.use_dora and stacked and self.model.adapters == "stack":
                text = "DoRA would scale the base weights without the alignment adapter; "
                choice = "write user.adapter: continue" if bits else "write model.adapters: merge"
                raise Wrong([*place, "use_dora"], text + choice)

    def _check_bases(self) -> None:
        """A method that needs the model before alignment must get it, and nothing else may be given one."""
        if self.alignment is not None and self.alignment.base is not None:
            raise Wrong(["alignment", "base"], "the alignment starts from model.path; leave this out")
        for name in ("user", "post_hoc"):
            part: StageRecipe | PostHocRecipe | None = getattr(self, name)
            if part is None:
                continue
            needs = "base" in self.needs(name)
            if needs and self.alignment is None and part.base is None:
                text = f"{part.defense} needs the model before alignment, but alignment is none. Add an "
                raise Wrong([name], f"{text}alignment stage, or give the model before alignment: {name}.base")
            if self.alignment is not None and part.base is not None:
                text = (
                    "the base is model.path, from which the alignment stage starts. Leave it out, or write "
                )
                raise Wrong([name, "base"], f"{text}alignment: none if model.path is already aligned")
            if part.base is not None and not needs and "base" not in self.may_use(name):
                text = f"{part.defense} does not use the model before alignment; leave it out"
                raise Wrong([name, "base"], text)

    def _check_post_hoc(self, repair: PostHocRecipe) -> None:
        """The update that the method repairs must be separate from others, and its inputs must be on disk."""
        facts, needs = registry.face("defenses", repair.defense).facts, self.needs("post_hoc")
        who = f"{repair.defense} repairs"
        if self.user is None:
            raise Wrong(["post_hoc"], f"{who} what the user stage trained, but user is none; leave one out")
        self._need_rows("post_hoc")
        trains, aligns = self.trains("user"), self.alignment and self.trains("alignment")
        if trains == "continue" and trains not in facts.get("repairs", (trains,)):
            text = f"{who} the user's update, which adapter: continue ({self.user.defense}) does not keep "
            raise Wrong(["post_hoc"], f"{text}separate from the alignment. Write user.adapter: new")
        if trains not in facts.get("repairs", (trains,)):
            text = "all weights" if trains == "full" else "a separate adapter"
            raise Wrong(["post_hoc"], f"{repair.defense} does not repair {text}, which the user stage trains")
        if trains == "full" and aligns == "new" and "aligned" in needs:
            text = f"{who} all weights with those of the aligned model, which alignment with LoRA does not "
            raise Wrong(["post_hoc"], f"{text}save. Train both stages with LoRA, or both with lora: none")
        merges = "apply" in registry.face("defenses", repair.defense).code
        for stage, how in (("alignment", aligns), ("user", trains)) if merges else ():
            lora = self.lora(stage) if how == "new" else None
            if lora and lora.use_dora:
                text = (
                    f"{who} updates B A, but DoRA in the {stage} stage also scales the weights; leave one out"
                )
                raise Wrong(["post_hoc"], text)

    def _check_post_hoc_attack(self, attack: PostHocAttackRecipe) -> None:
        """An attack on weights needs harmful prompts, and adapters that can be added to the weights."""
        if attack.harmful is None and self.data.harmful is None:
            text = "give a file of harmful rows here, or as data.harmful"
            raise Wrong(["post_hoc_attack", "harmful"], text)
        for stage in ("alignment", "user"):
            lora = self.lora(stage) if getattr(self, stage) is not None else None
            if lora and lora.use_dora and self.trains(stage) != "full":
                text = f"{attack.name} needs the weights, to which DoRA in the {stage} stage cannot be added"
                raise Wrong(["post_hoc_attack"], f"{text}; leave one out")

    def _check_attack_sweep(self, sweep: AttackSweep) -> None:
        """The points must change a training that runs, and nothing that an attack on rows also sets."""
        if self.user is None:
            raise Wrong(["attack_sweep"], "this sweeps the training of the user stage, but user is none")
        if "rank" in sweep.keys and self.trains("user") != "new":
            text = "the user stage trains no adapter of its own, so it has no rank"
            raise Wrong(["attack_sweep", "rank"], f"{text}; leave it out, or write user.adapter: new")
        length = "steps" if "steps" in sweep.keys else "epochs"
        if length in sweep.keys and "num_train_epochs" in self.data.attack_training():
            raise Wrong(["attack_sweep", length], "data.attack sets the epochs; leave one of the two out")

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

    def _need_alignment_data(self, who: str) -> None:
        if self.data.alignment is None:
            raise ValueError(f"{who} needs data.alignment: a file of prompts with safe answers")

    def _need_rows(self, stage: str) -> None:
        """The rows that a stage's defense needs must be there."""
        if "alignment" in self.reads(stage):
            self._need_alignment_data(f"{stage}.defense {getattr(self, stage).defense}")
        if "harmful" in self.reads(stage) and self.data.alignment_harmful()[0] is None:
            defense = getattr(self, stage).defense
            text = f"{stage}.defense {defense} needs harmful rows: give a file of them here, or as "
            raise Wrong(["data", "alignment", "harmful"], f"{text}data.harmful")

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
        recipe = _beside(recipe, files)
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


def _beside(recipe: Recipe, files: Sequence[layers.Layer]) -> Recipe:
    """Resolve relative paths: from the working folder first, then from the folder of their recipe file."""

    def found(value: str | None, *place: str) -> str | None:
        if value is None or value in registry.faces("tasks") or os.path.exists(value):
            return value
        name, colon, path = value.partition(":")
        named = bool(colon) and name in registry.faces("tasks")  # a file in the format of a known data set
        local = path if named else value
        beside = layers.origin(files, place).folder / local
        if not local or os.path.exists(local) or not os.path.exists(beside):
            return value
        return f"{name}:{beside.resolve()}" if named else str(beside.resolve())

    def folders(stage: str) -> dict[str, Any]:
        """The folders of weights that a stage's method names."""
        part: StageRecipe | PostHocRecipe = getattr(recipe, stage)
        named = registry.face("defenses", part.defense).facts.get("folders", ())
        given = {name: value for name, value in part.parameters().items() if name in named}

        def each(name: str, value: Any) -> Any:
            many = isinstance(value, list)
            return [each(name, one) for one in value] if many else found(value, stage, name)

        return {name: each(name, value) for name, value in given.items()}

    data = recipe.data
    alignment = data.alignment
    if alignment is not None:
        place = ("data", "alignment", "source")
        harmful = alignment.harmful and alignment.harmful.model_copy(
            update={"source": found(alignment.harmful.source, "data", "alignment", "harmful", "source")}
        )
        alignment = alignment.model_copy(
            update={"source": found(alignment.source, *place), "harmful": harmful}
        )
    sources = {
        key: found(getattr(data, key), "data", key)
        for key in ("user", "harmful", "test", "test_harmful", "benign")
    }
    path = found(recipe.model.path, "model", "path")
    user = recipe.user and recipe.user.model_copy(update={"base": found(recipe.user.base, "user", "base")})
    repair = recipe.post_hoc and recipe.post_hoc.model_copy(
        update={"base": found(recipe.post_hoc.base, "post_hoc", "base"), **folders("post_hoc")}
    )

    def judge_files(judge: Any, *place: str) -> Any:
        keys = ("path", "base", "policy")
        given = {key: getattr(judge, key, None) for key in keys}
        return judge.model_copy(update={k: found(v, *place) for k, v in given.items() if v is not None})

    evaluation = recipe.evaluation
    judges = [judge_files(judge, "evaluation", "judges") for judge in evaluation.judges]
    rater = judge_files(evaluation.rater, "evaluation", "rater") if evaluation.raters else evaluation.rater
    ability = evaluation.lm_eval and evaluation.lm_eval.model_copy(
        update={"include_path": found(evaluation.lm_eval.include_path, "evaluation", "lm_eval")}
    )
    tamper = recipe.post_hoc_attack and recipe.post_hoc_attack.model_copy(
        update={
            key: found(getattr(recipe.post_hoc_attack, key), "post_hoc_attack", key)
            for key in ("harmful", "harmless")
        }
    )

    def anchors(attack: Any, *place: str) -> Any:
        if not isinstance(attack, AnchoringRecipe | ScoreFilterRecipe):
            return attack
        safe, where = attack.safe, (*place, "safe")
        resolved = [found(one, *where) for one in safe] if isinstance(safe, list) else found(safe, *where)
        update = {"harmful": found(attack.harmful, *place, "harmful"), "safe": resolved}
        return attack.model_copy(update=update)

    screen = data.filter and anchors(judge_files(data.filter, "data", "filter"), "data", "filter")
    attack = data.attack
    if isinstance(attack, list):
        attack = [anchors(one, "data", "attack", str(i)) for i, one in enumerate(attack)]
    else:
        attack = anchors(attack, "data", "attack")
    return recipe.model_copy(
        update={
            "evaluation": evaluation.model_copy(
                update={"judges": judges, "rater": rater, "lm_eval": ability}
            ),
            "user": user,
            "post_hoc": repair,
            "post_hoc_attack": tamper,
            "model": recipe.model.model_copy(update={"path": path}),
            "data": data.model_copy(
                update={**sources, "alignment": alignment, "attack": attack, "filter": screen}
            ),
        }
    )
