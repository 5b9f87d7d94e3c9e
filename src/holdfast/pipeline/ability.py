"""The step that measures the general ability of one state of the model by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError
from holdfast.machine.code import digest_of_files
from holdfast.machine.files import read_json, write_json
from holdfast.machine.store import Store
from holdfast.measuring import ability
from holdfast.pipeline.chain import checked_tokenizer, loading, tokenizer_of, weights
from holdfast.pipeline.evaluating import before_questions
from holdfast.pipeline.step import Content, Inputs, Machine
from holdfast.pipeline.versions import ABILITY_BY, packages
from holdfast.recipe import Recipe

RESULTS = "ability.json"


def ability_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return the inputs that the block `evaluation.lm_eval` gives; the model and its chain are added to them.

    Raises:
        RecipeError: the folder with further tasks does not exist.
    """
    asked = recipe.evaluation.lm_eval
    assert asked is not None
    return {
        "tasks": list(asked.tasks),
        "limit": asked.limit,
        "num_fewshot": asked.num_fewshot,
        "batch_size": asked.batch_size,
        "include": _folder(asked.include_path),
        "system": recipe.evaluation.system,
        "packages": packages(ABILITY_BY, recipe.model.quantization),
    }


def detail(recipe: Recipe) -> str:
    """Return the text that `plan` shows."""
    asked = recipe.evaluation.lm_eval
    assert asked is not None
    most = f", at most {asked.limit} questions each" if asked.limit else ""
    return f"{', '.join(asked.tasks)}{most}"


def measure_ability(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the harness's results for one state of the model to `ability.json`."""
    from holdfast.data.prompts import resolve_template
    from holdfast.models.loading import load_model

    described = inputs["model"]
    tokenizer = tokenizer_of(described)
    chat = resolve_template(tokenizer, inputs["template"]) == "chat"
    before, _ = before_questions(inputs["prefix"])
    base, adapters = weights(described["base"].folder, inputs["chain"])
    model = load_model(base, adapters, device=machine.device, **loading(described))
    found = ability.measure(
        model, tokenizer, inputs["tasks"], limit=inputs["limit"], num_fewshot=inputs["num_fewshot"],
        batch_size=inputs["batch_size"], include=inputs["include"], chat=chat,
        system="\n\n".join(text for text in (before, inputs["system"]) if text),
    )  # fmt: skip
    write_json(folder / RESULTS, {**found, "limit": inputs["limit"], "chat_template": chat})
    return {"harness": found["harness"]}


def check_ability(inputs: Inputs, machine: Machine) -> None:
    """Check that the harness is installed and has the tasks and their data; all states share the check."""
    if not machine.processes.main:
        return
    try:
        names, include = tuple(inputs["tasks"]), inputs["include"]
        machine.once(("lm_eval", names, include), lambda: ability.check_tasks(names, include))
    except RecipeError as error:
        raise error.at("evaluation", "lm_eval") from error
    checked_tokenizer(inputs["model"], machine)


def of_row(step: str | None, store: Store) -> dict[str, Any]:
    """Return the results of a step as a part of its state's row; nothing if they were not asked for."""
    return {} if step is None else {"lm_eval": read_json(store.path(step) / RESULTS)["tasks"]}


def stamp(step: str | None, store: Store) -> dict[str, Any]:
    """Return the harness, its tasks with versions, and its settings, as a part of the protocol stamp."""
    if step is None:
        return {}
    found = read_json(store.path(step) / RESULTS)
    tasks = [f"{name}@{task['version']}, {_shots(task)}" for name, task in found["tasks"].items()]
    return {
        "lm_eval": {
            "harness": found["harness"], "tasks": tasks, "limit": found["limit"],
            "chat_template": found["chat_template"],
        }
    }  # fmt: skip


def _shots(task: Mapping[str, Any]) -> str:
    return f"{task['num_fewshot'] or 0}-shot"


def _folder(path: str | None) -> Content | None:
    """Return a folder with further tasks as an input, identified by the content of all its files."""
    if path is None:
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        text = f"evaluation.lm_eval.include_path: {path} is not a folder. Expected a folder with YAML tasks."
        raise RecipeError(text).at("evaluation", "lm_eval", "include_path")
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return Content(str(folder), digest_of_files(files))
