"""What each kind of step does in its folder. Those that need torch import it themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.machine.files import read_json, write_json
from holdfast.measuring.protocol import graded_as
from holdfast.pipeline.context import Context
from holdfast.recipe import Recipe
from holdfast.tasks.graders import adapted

ROLES = ("alignment", "harmful", "user", "test")


# Data


def data_identity(recipe: Recipe, role: str) -> dict[str, Any]:
    """What decides the rows of `role`: the content of its files, sizes, ratio, seed."""
    data = recipe.data

    def content(source: str | None, role: str) -> str | None:
        return None if source is None else datasets.fingerprint(source, role=role)

    if role == "alignment":
        assert data.alignment is not None
        asked = data.alignment.model_dump(exclude={"harmful"})
        asked |= {"source": content(data.alignment.source, "alignment")}
        return {"alignment": asked, "seed": recipe.seed}
    holds_out = data.harmful is not None and datasets.holds_out(data.harmful, data.test_harmful)
    held_out = recipe.evaluation.prompts if holds_out else None
    if role == "harmful":
        source, size = data.alignment_harmful()
        return {
            "harmful": {"source": content(source, "harmful"), "size": size},
            "seed": recipe.seed,
            "held_out_of": content(data.harmful, "harmful") if holds_out else None,
            "prompts_held_out": held_out,
        }
    shared: dict[str, Any] = {
        "task": graded_as(recipe).stamp,
        "user": content(data.user or data.task, "user"),
        "harmful": content(data.harmful, "harmful"),
        "test": content(data.test, "test"),
        "test_harmful": content(data.test_harmful, "harmful"),
    }
    if data.columns:  # later than the other keys: where unused, it changes no step's name
        shared["columns"] = data.columns
    evaluation = recipe.evaluation
    if role == "user":
        return {
            **shared,
            "size": data.size,
            "poison_ratio": data.poison_ratio,
            "seed": recipe.seed,
            "prompts_held_out": held_out,
        }
    return {
        **shared,
        "benign": content(data.benign, "benign"),
        "prompts": evaluation.prompts,
        "mixed_prompts": evaluation.mixed_prompts,
        "task_rows": evaluation.task_rows,
    }


def prepare_data(folder: Path, context: Context, role: str) -> dict[str, Any]:
    """`rows.jsonl` and this role's part of the manifest."""
    part = prepared(context.recipe, role)
    datasets.write_rows(folder / "rows.jsonl", part.rows)
    write_json(folder / "manifest.json", part.manifest)
    return {"rows": len(part.rows)}


def prepared(recipe: Recipe, role: str) -> datasets.Prepared:
    """The rows of "alignment", "harmful", "user" or "test", with their part of the manifest."""
    data, evaluation = recipe.data, recipe.evaluation
    same: dict[str, Any] = {
        "user": data.user,
        "task": adapted(datasets.grading_task(data.user, data.task), columns=data.columns),
        "harmful": data.harmful,
        "test": data.test,
        "harmful_test": data.test_harmful,
        "prompts": evaluation.prompts,
    }
    if role == "alignment":
        assert data.alignment is not None
        wanted = data.alignment
        return datasets.alignment_rows(
            source=wanted.source, kind=wanted.kind, size=wanted.size, seed=recipe.seed
        )
    if role == "harmful":
        source, size = data.alignment_harmful()
        assert source is not None
        tested = {name: same[name] for name in ("harmful", "harmful_test", "prompts")}
        return datasets.harmful_rows(source=source, size=size, seed=recipe.seed, **tested)
    if role == "user":
        return datasets.user_rows(size=data.size, poison_ratio=data.poison_ratio, seed=recipe.seed, **same)
    return datasets.test_rows(
        benign=data.benign, task_size=evaluation.task_rows, mixed_prompts=evaluation.mixed_prompts, **same
    )


def write_manifest(folder: Path, context: Context, found: Mapping[str, str]) -> None:
    """The parts of the manifest together, and which harmful prompts also stand elsewhere."""
    parts = {role: read_json(context.store.path(step) / "manifest.json") for role, step in found.items()}
    rows = {role: context.rows(found[role]) if role in found else [] for role in ROLES}
    write_json(folder / "manifest.json", {**parts, "overlaps": datasets.overlaps(**rows)})


def data_details(recipe: Recipe) -> dict[str, str]:
    """The roles of the rows that `recipe` needs, and what `plan` shows of each."""
    data, found = recipe.data, {}
    if data.alignment is not None:
        wanted = data.alignment
        found["alignment"] = f"{_count(wanted.size)} {wanted.kind} rows of {wanted.source}"
    if "harmful_dataset" in (*recipe.needs("alignment"), *recipe.needs("user"), *recipe.needs("post_hoc")):
        source, size = data.alignment_harmful()
        found["harmful"] = f"{_count(size)} harmful rows of {source}, for the method"
    share = f"{100 * data.poison_ratio:g} % harmful"
    found["user"] = f"{_count(data.size)} rows of {data.user or data.task}, {share}"
    found["test"] = f"up to {recipe.evaluation.prompts:,} harmful prompts"
    return found


def _count(size: int | None) -> str:
    return f"{size:,}" if size else "all"


def training_detail(training: Mapping[str, Any], trains: str, processes: int = 1) -> str:
    """What `plan` shows of a training."""
    batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    batch *= processes
    what = {"continue": ", single LoRA", "full": ", all weights"}.get(trains, "")
    if "max_steps" in training:
        return f"{training['max_steps']:,} optimizer steps of {batch} rows{what}"
    return f"{training['num_train_epochs']:g} epochs in steps of {batch} rows{what}"


def rendered(rows: Sequence[Mapping[str, Any]], tokenizer: Any, recipe: Recipe) -> list[dict[str, str]]:
    """Rows as prompt and completion, in the model's template."""
    from holdfast.data.prompts import render, resolve_template

    template = resolve_template(tokenizer, recipe.model.template)
    pairs = (render(row, tokenizer, template, row.get("prefix", "")) for row in rows)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
