"""What each kind of step does in its folder. Those that need torch import it themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast import mixed, registry, tasks
from holdfast.context import Context
from holdfast.recipe import Recipe
from holdfast.store import read_json, write_json
from holdfast.tasks.graders import adapted

ROLES = ("alignment", "harmful", "user", "test")


def model_path(path: str) -> str | Path:
    """The folder or Hub id of the model; "world" is the embedded one."""
    if path == "world":
        from holdfast import world

        return world.MODEL
    return path


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
    if "harmful_dataset" in (*recipe.needs("alignment"), *recipe.needs("user")):
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


# Training


def train_stage(
    folder: Path,
    context: Context,
    stage: str,
    defense: str,
    settings: Mapping[str, Any],
    rows: Mapping[str, str],
    below: Sequence[str],
) -> dict[str, Any]:
    """Train a stage on the rows of the named data steps, on top of what the steps `below` made.

    Args:
        settings: `parameters`, `training`, `trains` and `lora` of the stage.
    """
    from holdfast.training import TrainingJob, train
    from holdfast.weights.model import load_tokenizer

    recipe, device, method = context.recipe, context.device, registry.get_defense(defense)
    tokenizer = load_tokenizer(context.model, recipe.model.trust_remote_code)
    data: dict[str, Any] = {name: context.rows(step) for name, step in rows.items()}
    facts: dict[str, Any] = {}
    if method.mix is not None:
        with context.processes.main_first():  # the others find what the method keeps in the folder
            data, facts = mixed.mix(defense, data, settings["parameters"], recipe.seed, folder)
    base, adapters = context.weights(below)
    job = TrainingJob(
        stage=stage,
        defense=method,
        **settings,
        model=base,
        model_name=str(model_path(recipe.model.path) if base == context.model else base),
        tokenizer=tokenizer,
        model_options=context.model_options,
        adapters=adapters,
        rows={name: rendered(part, tokenizer, recipe) for name, part in data.items()},
        seed=recipe.seed,
    )
    trained = train(folder, job, device=device, progress=context.progress, processes=context.processes)
    return {**trained, "training": {**trained["training"], **facts}}


def rendered(rows: Sequence[Mapping[str, Any]], tokenizer: Any, recipe: Recipe) -> list[dict[str, str]]:
    """Rows as prompt and completion, in the model's template."""
    from holdfast.data.prompts import render, resolve_template

    template = resolve_template(tokenizer, recipe.model.template)
    pairs = (render(row, tokenizer, template, row.get("prefix", "")) for row in rows)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


# What is measured


def graded_as(recipe: Recipe) -> tasks.Task:
    """The task that the test rows are of: the named one, or that of own files."""
    return datasets.grading_task(recipe.data.user, recipe.data.task, recipe.data.test)


def grader(recipe: Recipe) -> tasks.Task:
    """The task that grades the test rows, with the recipe's grader if it names one."""
    return adapted(graded_as(recipe), recipe.data.grader)


def knows_truth(recipe: Recipe) -> bool:
    """Whether the harmful prompts are the world's, which knows what complies."""
    return (recipe.data.test_harmful or recipe.data.harmful) == "world"


def new_tokens(recipe: Recipe) -> dict[str, int]:
    """How many tokens each set of prompts may generate."""
    most = recipe.evaluation.max_new_tokens
    return {"harmful": most, "task": grader(recipe).max_new_tokens, "benign": most}


def asking(recipe: Recipe) -> dict[str, Any]:
    """What else decides the answers; a key is there only where the recipe asks for it."""
    found: dict[str, Any] = {}
    if two_turns(recipe):
        found["turns"] = 2
    if sampled := sampling(recipe):  # a sampled answer depends on its batch too
        found["sampling"] = {**sampled, "batch_tokens": recipe.evaluation.batch_tokens}
    if recipe.evaluation.system:
        found["system"] = recipe.evaluation.system
    return found


def sampling(recipe: Recipe) -> dict[str, Any] | None:
    """How answers are sampled, or None where decoding is greedy."""
    how = recipe.evaluation
    if not how.temperature:
        return None
    return {"temperature": how.temperature, "top_p": how.top_p, "seed": recipe.seed}


def decoding(recipe: Recipe) -> str:
    """The same in words, for the protocol: the seed is none of it."""
    how = sampling(recipe)
    return "greedy" if how is None else "temperature {temperature:g}, top_p {top_p:g}".format(**how)


def two_turns(recipe: Recipe) -> bool:
    """Whether the task asks a second question after the model's own first answer."""
    return grader(recipe).metric == "mt_bench"
