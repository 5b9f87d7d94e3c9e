"""From a recipe to steps, and from steps to results: the only file that knows the order of the stages.

Every step is named by the hash of what decides its content: its part of the recipe, the content of its
files, its parents, and the versions of what it uses. What changes only speed stays out. So running again
does what is missing, and recipes that share a stage share its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import evaluating, judging, mixed, post_hoc, preflight, registry, user_data, work
from holdfast.context import Context, State
from holdfast.errors import StepFailed
from holdfast.processes import Processes, launched
from holdfast.progress import Progress
from holdfast.recipe import Recipe
from holdfast.recipe_stages import ALIGNMENT_TRAINING, USER_TRAINING, StageRecipe
from holdfast.steps import FORMAT, Plan, Step, do, join
from holdfast.store import Store, versions


def plan(recipe: Recipe, *, download: bool = False) -> Plan:
    """What `recipe` would run. Reads files to name their content; writes nothing, imports no torch.

    Args:
        download: fetch a model from the Hub that is not in the local cache.

    Raises:
        DataError, ModelError: a file or a model is missing or cannot be used.
    """
    return _Planner(recipe, download).plan()


class _Planner:
    """Builds the steps one by one; each method adds one and returns its id."""

    def __init__(self, recipe: Recipe, download: bool):
        from holdfast.weights.model import find_model, fingerprint

        self.recipe = recipe
        self.download = download
        self.processes = launched().count
        self.steps: dict[str, Step] = {}
        self.folder = find_model(str(work.model_path(recipe.model.path)), recipe.model.revision, download)
        self.base = {
            "model": fingerprint(self.folder),
            "template": recipe.model.template,
            "dtype": recipe.model.dtype,
            "adapters": recipe.model.adapters,
        }
        if recipe.model.quantization:  # later than the other keys: where unused, it changes no step's name
            self.base["quantization"] = recipe.model.quantization
        self.versions = {k: v for k, v in versions().items() if k in ("torch", "transformers", "peft")}

    def plan(self) -> Plan:
        data = self._data()
        states = []
        recipe = self.recipe
        trained: tuple[str, ...] = ()
        weights: tuple[str, ...] = ()  # the trainings whose weights make the model
        if recipe.alignment is not None:
            rows = self._rows("alignment", data)
            trained = (self._train("alignment", recipe.alignment, ALIGNMENT_TRAINING, rows, ()),)
            weights = trained
        name = "base" if recipe.alignment is None else "aligned"
        states.append(self._evaluate(name, f"the {name} model", None, trained, weights, data["test"]))
        if recipe.user is not None:
            model = {**self.base, "chain": list(weights), "versions": self.versions}
            chosen = user_data.planned(recipe, data["user"], model, self.download, self._add)
            rows = self._rows("user", {**data, "user": [data["user"], *chosen.values()][-1]})
            step = self._train("user", recipe.user, USER_TRAINING, rows, weights)
            trained = (*trained, step)
            below = {"new": weights, "continue": weights[:-1], "full": ()}[recipe.trains("user")]
            weights = (*below, step)
            state = recipe.name, "the fine-tuned model", recipe.user.defense
            states.append(self._evaluate(*state, trained, weights, data["test"]))
            for repair in post_hoc.repairs(recipe):
                states.append(self._repair(repair, trained, weights, data["test"]))
            states[1:] = [replace(state, chosen=chosen) for state in states[1:]]
        return Plan(recipe, tuple(self.steps.values()), tuple(states), data["manifest"], self.folder)

    def _add(
        self, kind: str, title: str, detail: str, identity: Mapping[str, Any], do: Any, together: bool = False
    ) -> str:
        step = Step(kind, title, detail, identity, do, together)
        self.steps.setdefault(step.id, step)
        return step.id

    def _data(self) -> dict[str, str]:
        """The rows of each role, and the manifest of them all."""
        found: dict[str, str] = {}
        for role, detail in work.data_details(self.recipe).items():
            found[role] = self._add(
                "data",
                f"{role} rows",
                detail,
                {"format": FORMAT["data"], "role": role, **work.data_identity(self.recipe, role)},
                lambda folder, context, role=role: work.prepare_data(folder, context, role),
            )
        manifest = self._add(
            "manifest",
            "data manifest",
            "counts, realised poison ratio, overlaps",
            {"format": FORMAT["manifest"], "data": found},
            lambda folder, context: work.write_manifest(folder, context, found),
        )
        return {**found, "manifest": manifest}

    def _rows(self, stage: str, data: Mapping[str, str]) -> dict[str, str]:
        """The data steps of a stage, by keyword of its trainer."""
        roles = {"alignment_dataset": "alignment", "harmful_dataset": "harmful"}
        further = {name: data[roles[name]] for name in self.recipe.needs(stage)}
        return {"train_dataset": data[stage], **further}

    def _train(
        self,
        stage: str,
        part: StageRecipe,
        defaults: Mapping[str, Any],
        rows: Mapping[str, str],
        below: tuple[str, ...],
    ) -> str:
        """A training stage on top of what the steps `below` made."""
        face = registry.faces("defenses")[part.defense]
        parameters = self._parameters(part)
        training = {**defaults, **part.training.given()}
        trains = self.recipe.trains(stage)
        chosen = self.recipe.lora(stage) if trains == "new" else None
        lora = chosen.identity() if chosen else None
        identity = {
            "format": FORMAT["train"],
            **self.base,
            "defense": part.defense,
            "parameters": parameters,
            "training": training,
            "lora": lora,
            "rows": dict(rows),
            "below": list(below),
            "seed": self.recipe.seed,
            "versions": self.versions,
        }
        if trains != "new":
            identity["trains"] = trains
        if self.processes > 1:  # as many times the rows of a step: another result
            identity["processes"] = self.processes
        label = face.facts.get("label", part.defense)
        title = f"alignment with {label}" if stage == "alignment" else f"user fine-tuning with {label}"

        def do(folder: Path, context: Context) -> Mapping[str, Any]:
            settings = {"parameters": parameters, "training": training, "trains": trains, "lora": lora}
            return work.train_stage(folder, context, stage, part.defense, settings, rows, below)

        detail = work.training_detail(training, trains, self.processes)
        detail += mixed.detail(part.defense, parameters)
        return self._add(stage, title, detail, identity, do, together=True)

    def _repair(
        self, repair: post_hoc.Repair, trained: tuple[str, ...], weights: tuple[str, ...], test_data: str
    ) -> State:
        """Repair what the user stage, the last of `weights`, trained, and evaluate it."""
        from holdfast.weights.model import fingerprint

        recipe = self.recipe
        assert recipe.user is not None
        assert recipe.post_hoc is not None
        defense, tuned = recipe.post_hoc.defense, weights[-1]
        aligned = trained[0] if recipe.alignment is not None else None
        base = post_hoc.find_base(recipe, self.folder, self.download)
        step = self._add(
            "post_hoc",
            f"repair with {post_hoc.label(recipe)}",
            post_hoc.shown(repair.given),
            {
                "format": FORMAT["post_hoc"],
                "defense": defense,
                "parameters": repair.settings,
                "base": fingerprint(base),
                "aligned": aligned or self.base["model"],
                "tuned": tuned,
                "versions": {"numpy": versions()["numpy"]},
            },
            lambda folder, context: post_hoc.apply(
                folder, context, defense, repair.settings, tuned, aligned, base
            ),
        )
        chain = (*trained, step), (*weights[:-1], step)
        state = self._evaluate(repair.name, repair.name, recipe.user.defense, *chain, test_data)
        return replace(state, post_hoc=defense, post_hoc_parameters=repair.parameters)

    @staticmethod
    def _parameters(part: StageRecipe) -> dict[str, Any]:
        """A method's own parameters, defaults included."""
        known = registry.faces("defenses")[part.defense].parameters
        return {k: p.default for k, p in known.items()} | part.parameters()

    def _evaluate(
        self,
        name: str,
        what: str,
        user: str | None,
        trained: tuple[str, ...],
        weights: tuple[str, ...],
        test_data: str,
    ) -> State:
        """Generate, moderate by every judge, and score one state of the model."""
        recipe = self.recipe
        options = recipe.evaluation
        tokens = work.new_tokens(recipe)
        # By reference to the step: what stands before every question may be a secret.
        prefix = None
        before: dict[str, Any] = {}
        further: dict[str, Any] = {}
        if recipe.user is not None and user and "prefix" in registry.faces("defenses")[user].code:
            step = next(step for step in trained if step.startswith("user-"))
            prefix = {"step": step, "defense": user, "parameters": self._parameters(recipe.user)}
            before = {"prefix": step}
        generate = self._add(
            "generate",
            f"answers of {what}",
            f"at most {tokens['harmful']} new tokens, {work.decoding(recipe)}",
            {
                "format": FORMAT["generate"],
                **self.base,
                "chain": list(weights),
                "test": test_data,
                "max_new_tokens": tokens,
                "versions": self.versions,
                **before,
                **work.asking(recipe),
            },
            lambda folder, context: evaluating.generate_answers(
                folder, context, weights, test_data, tokens, prefix
            ),
        )
        moderate = tuple(
            self._add(
                "moderate",
                f"verdicts of {judge.shown} on {what}",
                judge.path or "",
                {
                    "format": FORMAT["moderate"],
                    "generate": generate,
                    "judge": judging.judge_identity(judge, self.versions, self.download),
                },
                lambda folder, context, judge=judge: evaluating.moderate_answers(
                    folder, context, judge, generate
                ),
            )
            for judge in options.judges
        )
        rate, rater = None, judging.rater(recipe)
        if rater is not None:
            named = judging.judge_identity(rater, self.versions, self.download)
            rate = further["rate"] = self._add(
                "rate",
                f"ratings by {rater.name} of {what}",
                rater.model or "",
                {"format": FORMAT["rate"], "generate": generate, "judge": named},
                lambda folder, context: evaluating.rate_answers(folder, context, rater, generate),
            )
        if any(judge.label for judge in options.judges):
            further["judges"] = [judge.shown for judge in options.judges]
        score = self._add(
            "score",
            f"scores of {what}",
            "",
            {
                "format": FORMAT["score"],
                "moderate": list(moderate),
                "task": work.grader(recipe).stamp,
                "truth": work.knows_truth(recipe),
                **further,
            },
            lambda folder, context: evaluating.score_answers(folder, context, generate, moderate, rate),
        )
        alignment = recipe.alignment.defense if recipe.alignment else None
        return State(name, alignment, user, None, trained, generate, moderate, score, rate)


def run(
    recipe: Recipe,
    *,
    out: str | Path,
    store: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do what is missing of `recipe` and return its results (also in `out/results.json`).

    Args:
        out: the run's folder; made, or continued if it is one already.
        store: where steps are kept; `out/steps` by default. Runs may share it.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        InputError: something given cannot be used; raised before training starts.
        StepFailed: a step stopped half-way. Running again goes on from there.
    """
    out, progress, processes = Path(out), progress or Progress(), launched()
    steps = Store(Path(store) if store else out / "steps")
    processes.start()
    try:
        if processes.main:
            done = _lead(recipe, out, steps, device, progress, processes)
            processes.tell({"done": done})
        else:
            done = _follow(recipe, steps, device, processes)
        processes.finish()
        return done
    except BaseException:
        processes.speaks()
        raise


def _lead(
    recipe: Recipe, out: Path, steps: Store, device: str, progress: Progress, processes: Processes
) -> dict[str, Any]:
    """What the main process does, which is everything; it tells the others when to join in."""
    from holdfast import results

    results.claim(out, recipe, steps.root)
    planned = plan(recipe, download=True)
    context = Context(recipe, steps, device, progress, planned.model, processes)
    missing = [step for step in planned.steps if steps.record(step.id) is None]
    if any(step.kind != "score" for step in missing):
        processes.tell({"do": "check"})
        preflight.check(context)
    cached = {step.id for step in planned.steps} - {step.id for step in missing}
    for step in planned.steps:
        do(step, context)
    return results.write(out, planned, steps, cached)


def _follow(recipe: Recipe, steps: Store, device: str, processes: Processes) -> dict[str, Any]:
    """What every other process does: wait, and join in the steps that are done together."""
    context, known = None, {}
    while "done" not in (order := processes.told()):
        if context is None:
            planned = plan(recipe)
            context = Context(recipe, steps, device, Progress(), planned.model, processes)
            known = {step.id: step for step in planned.steps}
        if order["do"] == "check":
            preflight.check(context)
        elif order["do"] in known:
            join(known[order["do"]], context)
        else:
            raise StepFailed(
                f"The main process does {order['do']}, which is no step of the recipe as this process reads "
                "it. Every process needs the same files, on a file system that all of them see."
            )
    return order["done"]
