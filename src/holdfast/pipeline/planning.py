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

from holdfast import registry
from holdfast.machine.processes import launched
from holdfast.machine.store import versions
from holdfast.measuring import judging, protocol
from holdfast.pipeline import evaluating, mixing, repairing, user_rows
from holdfast.pipeline.context import Context, State
from holdfast.pipeline.data import data_details, data_identity, prepare_data, training_detail, write_manifest
from holdfast.pipeline.step import FORMAT, Plan, Step
from holdfast.recipe import Recipe
from holdfast.recipe.stages import ALIGNMENT_TRAINING, NOT_IDENTITY, USER_TRAINING, StageRecipe


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
        from holdfast.weights.folders import find_model, fingerprint, model_path

        self.recipe = recipe
        self.download = download
        self.processes = launched().count
        self.steps: dict[str, Step] = {}
        self.folder = find_model(str(model_path(recipe.model.path)), recipe.model.revision, download)
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
            chosen = user_rows.planned(recipe, data["user"], model, self.download, self._add)
            rows = self._rows("user", {**data, "user": [data["user"], *chosen.values()][-1]})
            step = self._train("user", recipe.user, USER_TRAINING, rows, weights)
            trained = (*trained, step)
            below = {"new": weights, "continue": weights[:-1], "full": ()}[recipe.trains("user")]
            weights = (*below, step)
            state = recipe.name, "the fine-tuned model", recipe.user.defense
            states.append(self._evaluate(*state, trained, weights, data["test"]))
            for repair in repairing.repairs(recipe):
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
        for role, detail in data_details(self.recipe).items():
            found[role] = self._add(
                "data",
                f"{role} rows",
                detail,
                {"format": FORMAT["data"], "role": role, **data_identity(self.recipe, role)},
                lambda folder, context, role=role: prepare_data(folder, context, role),
            )
        manifest = self._add(
            "manifest",
            "data manifest",
            "counts, realised poison ratio, overlaps",
            {"format": FORMAT["manifest"], "data": found},
            lambda folder, context: write_manifest(folder, context, found),
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
            "training": {key: value for key, value in training.items() if key not in NOT_IDENTITY},
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
            from holdfast.pipeline.training import train_stage

            return train_stage(folder, context, stage, part.defense, settings, rows, below)

        detail = training_detail(training, trains, self.processes)
        detail += mixing.detail(part.defense, parameters)
        return self._add(stage, title, detail, identity, do, together=True)

    def _repair(
        self, repair: repairing.Repair, trained: tuple[str, ...], weights: tuple[str, ...], test_data: str
    ) -> State:
        """Repair what the user stage, the last of `weights`, trained, and evaluate it."""
        from holdfast.weights.folders import fingerprint

        recipe = self.recipe
        assert recipe.user is not None
        assert recipe.post_hoc is not None
        defense, tuned = recipe.post_hoc.defense, weights[-1]
        aligned = trained[0] if recipe.alignment is not None else None
        base = repairing.find_base(recipe, self.folder, self.download)
        step = self._add(
            "post_hoc",
            f"repair with {repairing.label(recipe)}",
            repairing.shown(repair.given),
            {
                "format": FORMAT["post_hoc"],
                "defense": defense,
                "parameters": repair.settings,
                "base": fingerprint(base),
                "aligned": aligned or self.base["model"],
                "tuned": tuned,
                "versions": {"numpy": versions()["numpy"]},
            },
            lambda folder, context: repairing.apply(
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
        tokens = protocol.new_tokens(recipe)
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
            f"at most {tokens['harmful']} new tokens, {protocol.decoding(recipe)}",
            {
                "format": FORMAT["generate"],
                **self.base,
                "chain": list(weights),
                "test": test_data,
                "max_new_tokens": tokens,
                "versions": self.versions,
                **before,
                **protocol.asking(recipe),
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
                "task": protocol.grader(recipe).stamp,
                "truth": protocol.knows_truth(recipe),
                **further,
            },
            lambda folder, context: evaluating.score_answers(folder, context, generate, moderate, rate),
        )
        alignment = recipe.alignment.defense if recipe.alignment else None
        return State(name, alignment, user, None, trained, generate, moderate, score, rate)
