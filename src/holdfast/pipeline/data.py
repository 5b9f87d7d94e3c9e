"""The data steps: the rows of each role, and one manifest of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast import registry
from holdfast.errors import about
from holdfast.machine.files import read_json, write_json
from holdfast.measuring.protocol import graded_as
from holdfast.pipeline.step import Code, Content, Inputs, Machine
from holdfast.pipeline.versions import version
from holdfast.recipe import Recipe
from holdfast.tasks.graders import adapted

ROLES = ("alignment", "harmful", "user", "test")

MAKE: Mapping[str, Callable[..., datasets.Prepared]] = {
    "alignment": datasets.alignment_rows,
    "harmful": datasets.harmful_rows,
    "user": datasets.user_rows,
    "test": datasets.test_rows,
}
"""The function that makes the rows of each role. The inputs of a data step are its arguments."""


def source(
    named: str | None,
    role: str,
    key: str = "",
    *,
    read: str | None = None,
    known: dict[Any, Any] | None = None,
) -> Content | None:
    """Return a data source as an input, identified by its content and the code of the data set that reads it.

    Args:
        named: the source as in the recipe; the work also gets None for None.
        key: the recipe key of the source, as in "data.user", for errors.
        read: the source that is read if `named` is None: the task's own data.
        known: what earlier calls read, for plans that are made together.
    """
    if named is None and read is None:
        return None
    place, known = named or read or "", {} if known is None else known
    if (place, role) not in known:
        name = place.partition(":")[0]
        code = version("tasks", name) if name in registry.faces("tasks") else None
        with about(*filter(None, key.split("."))):
            known[place, role] = {"content": datasets.fingerprint(place, role=role), "read_as": code}
    return Content(named, known[place, role])


def role_inputs(recipe: Recipe, role: str, known: dict[Any, Any] | None = None) -> dict[str, Any]:
    """Return the inputs of the data step of `role`: the arguments of `MAKE[role]` that affect its rows.

    Args:
        known: what earlier calls read from files, for plans that are made together.
    """
    known = {} if known is None else known
    data, evaluation = recipe.data, recipe.evaluation
    # Prompts are held out of the harmful rows only if these have no test split and no test file.
    pair = data.harmful, data.test_harmful
    if pair not in known:
        with about("data", "harmful"):
            known[pair] = data.harmful is not None and datasets.holds_out(data.harmful, data.test_harmful)
    holds_out = known[pair]
    held_out = {"prompts": evaluation.prompts} if holds_out else {}
    if role == "alignment":
        assert data.alignment is not None
        wanted = data.alignment
        return {
            "role": role, "kind": wanted.kind,
            "source": source(wanted.source, "alignment", "data.alignment.source", known=known),
            "size": wanted.size, "seed": recipe.seed, "skip_bad": data.skip_bad,
            "loss_on": wanted.loss_on, "take": data.take, "skip": wanted.skip,
        }  # fmt: skip
    if role == "harmful":
        named, size = data.alignment_harmful()
        whole = source(data.harmful, "harmful", "data.harmful", known=known)
        held_of = {"harmful": whole, **held_out} if holds_out else {}
        return {
            "role": role, "source": source(named, "harmful", "data.alignment.harmful", known=known),
            "size": size,
            "seed": recipe.seed, **held_of, "skip_bad": data.skip_bad, "loss_on": data.loss_on,
            "take": data.take, "skip": data.alignment_skip(),
        }  # fmt: skip
    shared = {
        "role": role,
        "task": Code("tasks", datasets.grading_task(data.user, data.task).name),
        "columns": data.columns,
        "suffix": data.suffix,
        "user": source(
            data.user, "user", "data.user" if data.user else "data.task", read=data.task, known=known
        ),
        "harmful": source(data.harmful, "harmful", "data.harmful", known=known),
        "test": source(data.test, "test", "data.test", known=known),
        "harmful_test": source(data.test_harmful, "harmful", "data.test_harmful", known=known),
        "skip_bad": data.skip_bad,
    }
    if role == "user":
        return {
            **shared, "size": data.size, "poison_ratio": data.poison_ratio, "seed": recipe.seed, **held_out,
            "loss_on": data.loss_on, "take": data.take, "system": data.system,
        }  # fmt: skip
    return {
        **shared,
        "graded_as": version("tasks", graded_as(recipe).name),
        "benign": source(data.benign, "benign", "data.benign", known=known),
        "prompts": evaluation.prompts,
        "mixed_prompts": evaluation.mixed_prompts,
        "task_size": evaluation.task_rows,
        "take": evaluation.take,
    }


def make_rows(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write `rows.jsonl` and this role's part of the manifest."""
    role = inputs["role"]
    asked = {n: inputs[n] for n in inputs if n not in ("role", "columns", "suffix", "graded_as", "system")}
    if "task" in asked:
        asked["task"] = adapted(asked["task"], columns=inputs["columns"], suffix=inputs["suffix"])
    part = MAKE[role](**asked)
    rows: Iterable[Mapping[str, Any]] = (
        datasets.numbered(part.rows) if inputs["take"] == "first" else part.rows
    )
    if role == "user" and inputs["system"]:
        rows = ({**row, "prefix": inputs["system"]} for row in rows)
    datasets.write_rows(folder / "rows.jsonl", rows)
    write_json(folder / "manifest.json", part.manifest)
    dropped = datasets.dropped_bad_rows(part.manifest)
    return {"rows": len(part.rows), **({"bad_rows_dropped": dropped} if dropped else {})}


def rows_of(step: Path) -> list[dict[str, Any]]:
    """Read the rows that a data step, an attack or a filter wrote."""
    return datasets.read_rows(step / "rows.jsonl")


def write_manifest(inputs: Inputs, folder: Path, machine: Machine) -> None:
    """Write the parts of the manifest as one, with the harmful prompts that also occur in other rows."""
    found = inputs["rows"]
    parts = {role: read_json(step / "manifest.json") for role, step in found.items()}
    rows = {role: rows_of(found[role]) if role in found else [] for role in ROLES}
    write_json(folder / "manifest.json", {**parts, "overlaps": datasets.overlaps(**rows)})


def data_details(recipe: Recipe) -> dict[str, str]:
    """Return the roles of the rows that `recipe` needs, with the text that `plan` shows for each."""
    data, found = recipe.data, {}
    if data.alignment is not None:
        wanted = data.alignment
        found["alignment"] = f"{_count(wanted.size)} {wanted.kind} rows of {wanted.source}"
    if any("harmful" in recipe.reads(stage) for stage in ("alignment", "user", "post_hoc")):
        named, size = data.alignment_harmful()
        found["harmful"] = f"{_count(size)} harmful rows of {named}, for the method"
    share = f"{100 * data.poison_ratio:g} % harmful"
    found["user"] = f"{_count(data.size)} rows of {data.user or data.task}, {share}"
    found["test"] = f"up to {recipe.evaluation.prompts:,} harmful prompts"
    return found


def _count(size: int | None) -> str:
    return f"{size:,}" if size else "all"


def rendered(rows: Sequence[Mapping[str, Any]], tokenizer: Any, template: str) -> list[dict[str, Any]]:
    """Return rows for a trainer as text, in the template `template`: "auto", "chat" or "alpaca"."""
    from holdfast.data.prompts import resolve_template, training_row

    chosen = resolve_template(tokenizer, template)
    return [training_row(row, tokenizer, chosen, row.get("prefix", "")) for row in rows]
