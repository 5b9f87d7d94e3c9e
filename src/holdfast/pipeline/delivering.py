"""What a run delivers: one plain adapter of its last model, a card with its scores, and its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import ModelError, OutputError
from holdfast.machine.files import read_json, write_json, write_text
from holdfast.pipeline.chain import made_in
from holdfast.recipe import Recipe

SCORES = {
    "harmful_score": "Harmful score (lower is better)",
    "finetune_accuracy": "Finetune accuracy",
    "task_score": "Task score",
    "benign_compliance": "Benign compliance",
    "over_refusal_rate": "Over-refusal rate (lower is better)",
    "gibberish_rate": "Gibberish rate (lower is better)",
}
"""The scores of the card, with their titles."""
KEPT = ("holdfast", "name", "recipe", "rows", "protocol", "versions", "git_commit", "started", "finished")
"""The parts of `results.json` that are delivered."""


def check(recipe: Recipe) -> None:
    """Check that the run of a recipe delivers an adapter.

    Raises:
        OutputError: it trains no adapter, or all weights.
    """
    stages = [stage for stage in ("alignment", "user") if getattr(recipe, stage) is not None]
    if not stages:
        raise OutputError("--push uploads the adapter of the run, but this recipe trains nothing.")
    if any(recipe.trains(stage) == "full" for stage in stages):
        raise OutputError(
            "--push uploads the adapter of the run, but this recipe trains all weights. Upload the folder "
            "`model` of its last step yourself."
        )


def deliver(run: Path, folder: Path) -> Path:
    """Write the adapter of a run's last model to a new folder, with a card and its results.

    Controls of a repair are left out. Answers to prompts are not part of the results.

    Args:
        run: the folder of a complete run.
        folder: a new folder.

    Raises:
        ModelError: the adapters cannot be combined into one.
        OutputError: the run has no adapter, or the folder is not new.
    """
    from holdfast.weights.card import without_paths
    from holdfast.weights.combine import combine

    results = read_json(run / "results.json")
    recipe = Recipe.model_validate(results["recipe"])
    check(recipe)
    row = last(results["rows"])
    store = (run / str(results["store"])).resolve()
    combine(adapters(recipe, row, store), folder)
    kept = {key: without_paths(results[key]) for key in KEPT if key in results}
    write_json(folder / "results.json", kept)
    write_text(folder / "README.md", card(results, row, recipe))
    return folder


def last(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the model that is delivered: the last one that is no control and not attacked."""
    kept = [row for row in rows if row.get("role") != "control" and "tamper" not in row["steps"]]
    return kept[-1]


def adapters(recipe: Recipe, row: Mapping[str, Any], store: Path) -> list[Path]:
    """The adapters of a model, in their order; a repair replaces the adapter that it repairs."""
    steps = row["steps"]
    found = [steps[stage] for stage in ("alignment", "user") if steps.get(stage)]
    if steps.get("user") and recipe.trains("user") == "continue":
        found = found[-1:]
    if steps.get("post_hoc"):
        found = [*found[:-1], steps["post_hoc"]]
    folders = [made_in(store / step) for step in found]
    if not folders:
        raise OutputError("--push uploads an adapter, but the last model of this run is the base model.")
    for adapter in folders:
        if adapter.name == "model" or not adapter.is_dir():
            raise ModelError(f"Expected an adapter of the run, found none: {adapter}.")
    return folders


def card(results: Mapping[str, Any], row: Mapping[str, Any], recipe: Recipe) -> str:
    """The model card: base model, methods, scores of every model of the run, and the protocol stamp."""
    from holdfast.weights.card import public_name, without_paths

    names = [str(row[stage]) for stage in ("alignment", "user", "post_hoc") if row.get(stage)]
    labels = row.get("labels") or {}
    methods = " → ".join(str(labels.get(name, name)) for name in names)
    stamp = [f"- {key}: {json.dumps(without_paths(value))}" for key, value in results["protocol"].items()]
    text = [
        *_head(recipe, names),
        f"# {results['name']}: {methods}, made with Holdfast",
        "",
        f"A LoRA adapter for `{public_name(recipe.model.path)}`.",
        f"It is the model `{row['name']}` of the table, seed {row.get('seed')}.",
        *_notes(recipe, names),
        "",
        *_table(results["rows"]),
        "",
        "Percentages; ± is the standard error over the answers. `results.json` has all numbers and settings.",
        "",
        "Measured under:",
        "",
        *stamp,
        "",
        f"Not measured: {_missing(row)}.",
        "A low harmful score under one judge and one prompt set is not safety.",
    ]
    return "\n".join(text) + "\n"


def _head(recipe: Recipe, methods: Sequence[str]) -> list[str]:
    """The block of the card that the Hub reads."""
    from holdfast.weights.card import is_hub_id, public_name

    head: dict[str, Any] = {"library_name": "peft", "tags": ["holdfast", "lora", *dict.fromkeys(methods)]}
    if is_hub_id(recipe.model.path):
        head |= {"base_model": public_name(recipe.model.path), "base_model_relation": "adapter"}
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"]


def _notes(recipe: Recipe, methods: Sequence[str]) -> list[str]:
    """How the methods must be served, and what combining the adapters rounds."""
    serving = [str(registry.face("defenses", name).facts.get("serving") or "") for name in methods]
    notes = [text for text in dict.fromkeys(serving) if text]
    if recipe.model.adapters == "merge" and None not in (recipe.alignment, recipe.user):
        text = "The user stage was trained on merged weights: this adapter differs from that model by their"
        notes.append(f"{text} rounding.")
    return [line for note in notes for line in ("", note)]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores of all models of the run."""
    scores = [key for key in SCORES if any(row.get(key) is not None for row in rows)]
    if "finetune_accuracy" in scores:  # then the task's score is that accuracy
        scores.remove("task_score")
    lines = [f"| model | {' | '.join(SCORES[key] for key in scores)} |", f"|---|{'---:|' * len(scores)}"]
    return [
        *lines,
        *(f"| {row['name']} | {' | '.join(_score(row, key) for key in scores)} |" for row in rows),
    ]


def _missing(row: Mapping[str, Any]) -> str:
    either = ("finetune_accuracy", "task_score")
    scored = any(row.get(key) is not None for key in either)
    absent = [key for key in SCORES if row.get(key) is None and not (key in either and scored)]
    found = [SCORES[key].partition(" (")[0].lower() for key in absent]
    return ", ".join(found) or "anything that is not in the table"


def _score(row: Mapping[str, Any], key: str) -> str:
    value, error = row.get(key), row.get(f"{key}_stderr")
    if not isinstance(value, int | float):
        return "not measured"
    return f"{value:.1f} ± {error:.1f}" if isinstance(error, int | float) else f"{value:.1f}"
