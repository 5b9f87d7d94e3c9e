"""Build the steps of a recipe. This is the only file that knows the order of the stages.

Every step is named by the hash of its inputs. Running again therefore runs only the missing steps, and
recipes that have a stage in common share its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast import registry, world
from holdfast.errors import InputError
from holdfast.machine.code import digest_of_module
from holdfast.machine.digests import Digests
from holdfast.machine.processes import launched
from holdfast.machine.store import now
from holdfast.measuring import judging, protocol
from holdfast.pipeline import (
    ability,
    attacking,
    data,
    evaluating,
    mixing,
    repairing,
    screening,
    stages,
    user_rows,
    weight_attacks,
)
from holdfast.pipeline.chain import model_input, with_folders
from holdfast.pipeline.step import Check, Code, Content, Made, Step, Work
from holdfast.pipeline.versions import ANSWERED_BY, REPAIRED_BY, TRAINED_BY, packages
from holdfast.recipe import Recipe
from holdfast.recipe.data import AnchoringRecipe, ScoreFilterRecipe
from holdfast.recipe.evaluation import JudgeRecipe
from holdfast.recipe.stages import (
    ALIGNMENT_TRAINING,
    NOT_IDENTITY,
    POST_HOC_TRAINING,
    USER_TRAINING,
    StageRecipe,
    Training,
    with_decimals,
)


@dataclass(frozen=True)
class State:
    """A state of the model that is evaluated: its defenses, and the ids of its steps.

    Attributes:
        chain: the trainings that led to it, even if a later one continued their adapter, and the repair.
        post_hoc_parameters: the parameters of the repair.
        lm_eval: the step of lm-evaluation-harness, if the recipe asks for it.
        chosen: the steps that change or select user rows, by kind; a list for several attacks.
        tampered: the attack on its weights.
        point: the point of an attack sweep at which it was trained.
    """

    name: str
    alignment: str | None
    user: str | None
    post_hoc: str | None
    chain: tuple[str, ...]
    generate: str
    moderate: tuple[str, ...]
    score: str
    rate: str | None = None
    lm_eval: str | None = None
    post_hoc_parameters: Mapping[str, Any] | None = None
    chosen: Mapping[str, str | list[str]] = field(default_factory=dict)
    tampered: str | None = None
    point: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of a run in order, and the states of the model that it evaluates.

    Attributes:
        dtype: the dtype that the model computes in.
        elsewhere: what is not on this machine, so that the names of the steps are not known.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    states: tuple[State, ...]
    manifest: str
    model: Path
    elsewhere: tuple[str, ...] = ()
    dtype: str = "float32"

    def __iter__(self) -> Any:
        return iter(self.steps)


def plan(
    recipe: Recipe,
    *,
    download: bool = False,
    digests: Digests | None = None,
    today: str | None = None,
    partial: bool = False,
    device: str = "auto",
    processes: Mapping[str, int] | None = None,
    known: dict[Any, Any] | None = None,
) -> Plan:
    """Return the steps of `recipe`. Reads files to identify their content; writes nothing, imports no torch.

    Args:
        download: download a Hub model that is not in the local cache.
        digests: caches the SHA-256 of large files between calls.
        today: the date for a chat template that writes one, if the recipe does not set
            `model.template_date`: that of the run's first start. The recipe of the plan holds it.
        partial: also plan with models and data sets of the Hub that are not on this machine. Such a plan
            names them in `elsewhere`, and cannot be run.
        device: the device that computes, which decides about `model.dtype: auto`. torch is imported only for
            a model that is stored with 16 bits.
        processes: by stage ("alignment", "user"), the number of processes that train together; by default
            those that were started together with this one, at every stage.
        known: what earlier plans read from files; plans that are made together share it, and no other.

    Raises:
        DataError, ModelError: a file or a model is missing or cannot be used.
    """
    today, digests = today or now()[:10], digests or Digests()
    return _Planner(recipe, download, digests, today, partial, device, processes, known).plan()


TITLES = {
    "alignment": "alignment with {label}",
    "user": "user fine-tuning with {label}",
    "harmful_adapter": "adapter on the harmful rows",
    "refusal_adapter": "adapter on the alignment rows, above the harmful one",
    "post_hoc": "repair with {label}",
}
"""The titles of trainings, by kind of step."""


class _Planner:
    """Builds the steps one by one; each method adds a step and returns its id."""

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
        with self._noted():
            self.folder = find_model(path, recipe.model.revision, download)
        dated = not recipe.model.template.startswith("alpaca") and writes_date(self.folder)
        date = (recipe.model.template_date or today) if dated else None
        model = recipe.model.model_copy(update={"template_date": date})
        self.recipe = recipe = recipe.model_copy(update={"model": model})
        self.at = ""  # the point of an attack sweep, for titles
        described = repr(recipe.model), self.folder, device
        if described not in self.known:
            self.known[described] = model_input(recipe, self.folder, digests, device)
        self.model: dict[str, Any] = {
            "model": self.known[described],
            "template": recipe.model.template,
        }

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """In a partial plan, note an input that is not on this machine instead of raising its error."""
        try:
            yield
        except InputError as error:
            if not (self.partial and error.elsewhere):
                raise
            self.elsewhere[str(error)] = None

    def plan(self) -> Plan:
        rows = self._data()
        states = []
        recipe = self.recipe
        trained: tuple[str, ...] = ()
        weights: tuple[str, ...] = ()  # the trainings whose weights form the model
        if recipe.alignment is not None:
            given = self._rows("alignment", rows)
            trained = (self._train("alignment", recipe.alignment, ALIGNMENT_TRAINING, given, ()),)
            if repairing.hardens(recipe.alignment):
                trained = (*trained, self._harden(recipe.alignment, trained[0]))
            weights = trained[-1:]
        name = "base" if recipe.alignment is None else "aligned"
        states.append(self._evaluate(name, f"the {name} model", None, trained, weights, rows["test"]))
        if recipe.user is not None and recipe.attack_sweep is not None:
            for point in recipe.attack_sweep.each():
                self.recipe, self.at = recipe.at(point), f" at {point.shown}"
                tuned = self._tuned(rows, trained, weights)
                states += [replace(state, point=point.given()) for state in tuned]
            self.recipe, self.at = recipe, ""
        elif recipe.user is not None:
            states += self._tuned(rows, trained, weights)
        elif recipe.post_hoc_attack is not None:
            states.append(self._tamper(states[0], weights, rows["test"]))
        dtype = self.model["model"]["dtype"].digest
        steps, found = tuple(self.steps.values()), tuple(states)
        return Plan(recipe, steps, found, rows["manifest"], self.folder, tuple(self.elsewhere), dtype)

    def _tuned(
        self, rows: Mapping[str, str], trained: tuple[str, ...], aligned: tuple[str, ...]
    ) -> list[State]:
        """Add the user stage on top of the weights of the steps `aligned`, and what comes after it."""
        recipe, test = self.recipe, rows["test"]
        assert recipe.user is not None
        chosen, last = self._chosen(rows["user"], aligned)
        rows = {**rows, "user": last}
        buffer = self._harmful_adapter("user", rows, aligned)
        step = self._train("user", recipe.user, USER_TRAINING, self._rows("user", rows), aligned, buffer)
        trained = (*trained, step)
        below = {"new": aligned, "continue": aligned[:-1], "full": ()}[recipe.trains("user")]
        weights = (*below, step)
        state = recipe.name, "the fine-tuned model", recipe.user.defense
        states = [self._evaluate(*state, trained, weights, test)]
        for repair in repairing.repairs(recipe):
            states.append(self._repair(repair, trained, weights, aligned, rows))
        if recipe.post_hoc_attack is not None:
            states += [self._tamper(one, (*below, one.chain[-1]), test) for one in states]
        return [replace(state, chosen=chosen) for state in states]

    def _add(
        self,
        kind: str,
        title: str,
        detail: str,
        inputs: Mapping[str, Any],
        work: Work,
        check: Check | None = None,
        together: bool = False,
    ) -> str:
        if kind not in ("attack", "change", "filter"):  # which the points of an attack sweep share
            title += self.at
        step = Step(kind, title, detail, inputs, work, check, together)
        self.steps.setdefault(step.id, step)
        return step.id

    def _data(self) -> dict[str, str]:
        """Add the rows of each role, and the manifest of all of them."""
        found: dict[str, str] = {}
        for role, detail in data.data_details(self.recipe).items():
            inputs: dict[str, Any] = {"role": role, "elsewhere": True}
            with self._noted():
                inputs = data.role_inputs(self.recipe, role, self.known)
            found[role] = self._add("data", f"{role} rows", detail, inputs, data.make_rows)
        manifest = self._add(
            "manifest",
            "data manifest",
            "counts, realised poison ratio, overlaps",
            {"rows": {role: Made(step) for role, step in found.items()}},
            data.write_manifest,
        )
        return {**found, "manifest": manifest}

    def _rows(self, stage: str, found: Mapping[str, str]) -> dict[str, Made]:
        """Return the data steps of a stage, by keyword argument of its trainer."""
        roles = {"alignment_dataset": "alignment", "harmful_dataset": "harmful"}
        needed = [name for name in self.recipe.needs(stage) if name in roles]
        further = {name: Made(found[roles[name]]) for name in needed}
        return {"train_dataset": Made(found[stage]), **further}

    def _chosen(self, rows: str, weights: tuple[str, ...]) -> tuple[dict[str, str | list[str]], str]:
        """Add the steps that change or select user rows.

        Returns:
            The steps by kind and in order (a list for several attacks), and the step with the final rows.
        """
        found: dict[str, str | list[str]] = {}
        attacks, screen = self.recipe.data.attacks, self.recipe.data.filter
        steps: list[str] = []
        inputs: dict[str, Any]
        given = rows
        for attack in attacks:
            if isinstance(attack, AnchoringRecipe):
                inputs = {
                    **self.model,
                    "chain": [Made(step) for step in weights],
                    "rows": Made(rows),
                    "seed": self.recipe.seed,
                    **user_rows.attack_inputs(self.recipe, attack),
                    "code": digest_of_module("holdfast.attacks.anchoring"),
                    "packages": packages(ANSWERED_BY, self.recipe.model.quantization),
                }
                title = f"user rows that {attack.name} chooses"
                detail = f"{attack.size:,} benign rows, by {attack.by} on the model that is fine-tuned"
                rows = self._add(
                    "attack", title, detail, inputs, user_rows.choose_rows, user_rows.check_attack
                )
            else:
                inputs = {"rows": Made(rows), **attacking.attack_inputs(attack, self.recipe.seed)}
                title = f"user rows that {attack.name} changes"
                rows = self._add("change", title, attacking.detail(attack), inputs, attacking.change_rows)
            steps.append(rows)
        if steps:
            found["attack"] = steps if len(steps) > 1 else rows
        if isinstance(screen, ScoreFilterRecipe):
            inputs = {
                **self.model,
                "chain": [Made(step) for step in weights],
                "rows": Made(rows),
                "before": Made(given) if rows != given else None,
                **screening.screen_inputs(self.recipe, screen),
                "code": digest_of_module("holdfast.measuring.row_scores"),
                "packages": packages(ANSWERED_BY, self.recipe.model.quantization),
            }
            title = f"user rows that {screen.score} does not drop"
            limit = f"scores above {screen.threshold:g}" if screen.share is None else f"{screen.share:.0%}"
            work = screening.filter_rows, screening.check_filter
            rows = found["filter"] = self._add("filter", title, f"drops {limit}", inputs, *work)
        elif screen is not None:
            # Its value changes no row, only whether there are rows.
            most = Content(self.recipe.evaluation.max_unparsed, "max_unparsed")
            inputs = {"rows": Made(rows), **self._judge(screen.judge_recipe), "unparsed": screen.unparsed}
            inputs |= {"max_unparsed": most, "before": Made(given) if rows != given else None}
            title = f"user rows that {screen.judge} does not flag"
            detail = f"{screen.unparsed}s rows without a verdict"
            rows = found["filter"] = self._add(
                "filter", title, detail, inputs, user_rows.filter_rows, evaluating.check_judge
            )
        return found, rows

    def _train(
        self,
        stage: str,
        part: StageRecipe,
        defaults: Mapping[str, Any],
        rows: Mapping[str, Made],
        below: tuple[str, ...],
        buffer: str | None = None,
        kind: str | None = None,
    ) -> str:
        """Add a training stage on top of the weights of the steps `below`.

        Args:
            buffer: the step of an adapter above these, which the result is used without.
            kind: the kind of step, if it is not the stage.
        """
        recipe = self.recipe
        if repairing.hardens(part):  # plain SFT, whose weights the method changes afterwards
            part = part.as_sft()
        parameters = self._parameters(part)
        training = {**defaults, **part.training.given()}
        if stage == "user" and kind is None:
            training |= recipe.data.attack_training()
        trains = recipe.trains(stage)
        processes = self.processes.get(stage, launched().count)
        last = "user" if stage == "post_hoc" else stage
        # Single LoRA continues the alignment stage's adapter.
        single = stage != "alignment" and recipe.trains("user") == "continue"
        lora = None if trains == "full" else recipe.lora("alignment" if single else last)
        inputs = {
            **self.model,
            "stage": kind or stage,
            "method": Code("defenses", part.defense),
            "parameters": parameters,
            "training": Content(training, {k: v for k, v in training.items() if k not in NOT_IDENTITY}),
            "trains": trains,
            "lora": lora.identity() if lora else None,
            "rows": dict(rows),
            "chain": [Made(step) for step in below],
            "seed": recipe.seed,
            "processes": processes,  # multiplies the rows of an optimizer step
            "packages": packages(TRAINED_BY, recipe.model.quantization),
            **({"buffer": Made(buffer)} if buffer else {}),
        }
        if kind is None and "base" in recipe.needs(stage) and not repairing.hardens(getattr(recipe, stage)):
            inputs |= repairing.alignment_inputs(recipe, stage, self._base(stage), self.digests)
        label = registry.face("defenses", part.defense).facts.get("label", part.defense)
        title = TITLES[kind or stage].format(label=label)
        detail = stages.training_detail(training, trains, processes)
        detail += mixing.detail(part.defense, parameters) or repairing.shown_after(parameters)
        work = stages.train_stage, stages.check_stage
        return self._add(kind or stage, title, detail, inputs, *work, together=True)

    def _base(self, stage: str) -> Path:
        """Return the folder of the model before alignment; in a partial plan, its name if it is elsewhere."""
        found = Path(getattr(self.recipe, stage).base or self.folder)
        with self._noted():
            found = repairing.find_base(self.recipe, stage, self.folder, self.digests, self.download)
        return found

    def _harmful_adapter(self, stage: str, rows: Mapping[str, str], below: tuple[str, ...]) -> str | None:
        """Add the adapter that plain SFT trains on the harmful rows, if the stage's method needs it."""
        if not {"harmful_adapter", "refusal_adapter"} & set(self.recipe.needs(stage)):
            return None
        return self._beside("harmful_adapter", rows["harmful"], below, None)

    def _beside(self, kind: str, rows: str, below: tuple[str, ...], buffer: str | None) -> str:
        """Add an adapter that is trained like the user's, with plain SFT and on other rows."""
        assert self.recipe.user is not None
        part, given = self.recipe.user.as_sft(), {"train_dataset": Made(rows)}
        return self._train("user", part, USER_TRAINING, given, below, buffer, kind)

    def _harden(self, part: StageRecipe, aligned: str) -> str:
        """Add the step in which a method changes what plain SFT aligned, before the user stage."""
        face, recipe = registry.face("defenses", part.defense), self.recipe
        parameters = self._parameters(part)
        inputs = {
            "model": self.model["model"],
            **repairing.hardening_inputs(recipe, self.folder, self.digests),
            "method": Code("defenses", part.defense),
            "settings": with_folders(parameters, face, self.digests),
            "tuned": Made(aligned),
            "aligned": None,
            "rows": {},
            "packages": packages(REPAIRED_BY),
        }
        title = f"aligned weights changed by {face.facts.get('label', part.defense)}"
        work = repairing.apply, repairing.check
        return self._add("harden", title, repairing.shown(parameters), inputs, *work)

    def _repair(
        self,
        repair: repairing.Repair,
        trained: tuple[str, ...],
        weights: tuple[str, ...],
        aligned: tuple[str, ...],
        rows: Mapping[str, str],
    ) -> State:
        """Add a repair of the user stage's weights (the last of `weights`), and its evaluation."""
        recipe = self.recipe
        assert recipe.user is not None
        assert recipe.post_hoc is not None
        trains = "trainer" in registry.face("defenses", recipe.post_hoc.defense).code
        step = self._patch(repair, weights, rows) if trains else self._apply(repair, weights, aligned, rows)
        chain = (*trained, step), (*weights[:-1], step)
        state = self._evaluate(repair.name, repair.name, recipe.user.defense, *chain, rows["test"])
        return replace(state, post_hoc=recipe.post_hoc.defense, post_hoc_parameters=repair.parameters)

    def _patch(self, repair: repairing.Repair, weights: tuple[str, ...], rows: Mapping[str, str]) -> str:
        """Add a post-hoc method that trains the user stage's weights further, on the alignment rows."""
        recipe = self.recipe.post_hoc
        assert recipe is not None
        part = StageRecipe(defense=recipe.defense, training=recipe.training or Training(), **repair.settings)
        given = {"train_dataset": Made(rows["alignment"])}
        return self._train("post_hoc", part, POST_HOC_TRAINING, given, weights)

    def _apply(
        self,
        repair: repairing.Repair,
        weights: tuple[str, ...],
        aligned: tuple[str, ...],
        rows: Mapping[str, str],
    ) -> str:
        """Add a post-hoc method that writes changed weights without training."""
        recipe = self.recipe
        assert recipe.post_hoc is not None
        face = registry.face("defenses", recipe.post_hoc.defense)
        inputs = {
            "model": self.model["model"],
            **repairing.repair_inputs(recipe, self._base("post_hoc"), self.digests),
            "method": Code("defenses", recipe.post_hoc.defense),
            "settings": with_folders(repair.settings, face, self.digests),
            "tuned": Made(weights[-1]),
            "aligned": Made(aligned[0]) if aligned else None,
            "rows": {name: Made(step) for name, step in repairing.rows(recipe, rows).items()},
            "packages": packages(REPAIRED_BY),
        }
        buffer = self._harmful_adapter("post_hoc", rows, aligned)
        if buffer is not None:
            refusal = self._beside("refusal_adapter", rows["alignment"], aligned, buffer)
            inputs["refusal_adapter"] = Made(refusal)
        title, detail = f"repair with {repairing.label(recipe)}", repairing.shown(repair.given)
        return self._add("post_hoc", title, detail, inputs, repairing.apply, repairing.check)

    def _tamper(self, state: State, weights: tuple[str, ...], test: str) -> State:
        """Add the attack on the weights of a state, and the evaluation of the result."""
        attack = self.recipe.post_hoc_attack
        assert attack is not None
        inputs: dict[str, Any] = {"elsewhere": True}
        with self._noted():
            inputs = weight_attacks.attack_inputs(self.recipe)
        inputs = {
            **self.model,
            "chain": [Made(step) for step in weights],
            **inputs,
            "packages": packages(tuple({*ANSWERED_BY, *REPAIRED_BY}), self.recipe.model.quantization),
        }
        name = f"{state.name}, then {attack.label[0].lower()}{attack.label[1:]}"
        work = weight_attacks.change_weights, weight_attacks.check_attack
        detail = repairing.shown(attack.parameters())
        step = self._add("tamper", f"{attack.label} of {state.name}", detail, inputs, *work)
        found = self._evaluate(name, name, state.user, (*state.chain, step), (step,), test)
        return replace(
            found,
            post_hoc=state.post_hoc,
            post_hoc_parameters=state.post_hoc_parameters,
            tampered=attack.name,
        )

    @staticmethod
    def _parameters(part: StageRecipe) -> dict[str, Any]:
        """Return a method's own parameters, with their defaults."""
        return with_decimals(part.parameters(), registry.face("defenses", part.defense))

    def _judge(self, judge: JudgeRecipe) -> dict[str, Any]:
        """Return a judge as inputs: its settings, the content of its model, its code and its packages."""
        if repr(judge) not in self.known:
            self.known[repr(judge)] = judging.judge_identity(judge, self.digests, self.download)
        content = self.known[repr(judge)]
        loads = judging.judge_folder(judge) is not None
        return {
            "judge": Content(judge, {**content, "code": Code("judges", judge.name)}),
            "packages": packages(ANSWERED_BY, judge.quantization) if loads else None,
        }

    def _prefix(self, user: str | None, trained: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the training whose method puts a text before every question; the text may be secret."""
        recipe = self.recipe
        if recipe.user is None or not user or "prefix" not in registry.face("defenses", user).code:
            return None
        step = next(step for step in trained if step.startswith("user-"))
        return {
            "step": Made(step),
            "method": Code("defenses", user),
            "parameters": self._parameters(recipe.user),
        }

    def _evaluate(
        self,
        name: str,
        what: str,
        user: str | None,
        trained: tuple[str, ...],
        weights: tuple[str, ...],
        test: str,
    ) -> State:
        """Add one state of the model: its answers, the verdicts of every judge, ratings and scores."""
        recipe, options = self.recipe, self.recipe.evaluation
        tokens = protocol.new_tokens(recipe)
        generate = self._add(
            "generate",
            f"answers of {what}",
            f"at most {tokens['harmful']} new tokens, {protocol.decoding(recipe)}",
            {
                **self.model,
                "chain": [Made(step) for step in weights],
                "test": Made(test),
                "max_new_tokens": tokens,
                # Rounding depends on the shape of a batch, so an answer may too.
                "batch_tokens": options.batch_tokens,
                "prefix": self._prefix(user, trained),
                "system": options.system,
                "sampling": protocol.sampling(recipe),
                **attacking.prompt_inputs(recipe),
                "packages": packages(ANSWERED_BY, recipe.model.quantization),
            },
            evaluating.generate_answers,
            evaluating.check_generation,
        )
        answers = Made(generate)
        moderate = tuple(
            self._add(
                "moderate",
                f"verdicts of {judge.shown} on {what}",
                judge.path or "",
                {"answers": answers, **self._judge(judge)},
                evaluating.moderate_answers,
                evaluating.check_judge,
            )
            for judge in options.judges
        )
        rate, rater = None, judging.rater(recipe)
        if rater is not None:
            title, detail = f"ratings by {rater.name} of {what}", rater.model or ""
            inputs = {"answers": answers, **self._judge(rater)}
            work = evaluating.rate_answers, evaluating.check_judge
            rate = self._add("rate", title, detail, inputs, *work)
        score = self._score(what, answers, moderate, rate)
        lm_eval = self._ability(what, user, trained, weights) if options.lm_eval else None
        alignment = recipe.alignment.defense if recipe.alignment else None
        return State(name, alignment, user, None, trained, generate, moderate, score, rate, lm_eval)

    def _ability(
        self, what: str, user: str | None, trained: tuple[str, ...], weights: tuple[str, ...]
    ) -> str:
        """Add the general ability of one state, measured by lm-evaluation-harness."""
        inputs = {
            **self.model,
            "chain": [Made(step) for step in weights],
            "prefix": self._prefix(user, trained),
            **ability.ability_inputs(self.recipe),
        }
        work = ability.measure_ability, ability.check_ability
        return self._add("lm_eval", f"general ability of {what}", ability.detail(self.recipe), inputs, *work)

    def _score(self, what: str, answers: Made, moderate: tuple[str, ...], rate: str | None) -> str:
        """Add the scores of one state: by every judge, the task's grader, and the truth if it is known."""
        recipe, judges = self.recipe, self.recipe.evaluation.judges
        inputs = {
            "answers": answers,
            "verdicts": [[j.shown, Made(step)] for j, step in zip(judges, moderate, strict=True)],
            "titles": [[judge.shown, judging.title(judge.name)] for judge in judges],
            "ratings": Made(rate) if rate else None,
            "task": Code("tasks", protocol.graded_as(recipe).name),
            "grader": recipe.data.grader,
            "max_unparsed": recipe.evaluation.max_unparsed,
            "truth": world.VERSION if protocol.knows_truth(recipe) else None,
            "code": digest_of_module("holdfast.evaluation.scoring"),
        }
        return self._add("score", f"scores of {what}", "", inputs, evaluating.score_answers)
