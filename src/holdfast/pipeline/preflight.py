"""Everything that can stop a run, checked before anything is trained; `run` and `plan` do the same checks.

All problems are found before the first is reported, each with the line of the recipe or of the rows.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast import registry
from holdfast.errors import DataError, InputError, about, problems, refuse
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline.plans import Plan
from holdfast.pipeline.rows_checked import BadRows
from holdfast.pipeline.step import Content, Inputs, Machine, Made, Step, do
from holdfast.recipe import Recipe
from holdfast.tasks.graders import adapted

ROWS = ("data", "manifest", "change")
"""Kinds of steps that only prepare rows. They run first, because the checks of other steps read the rows."""

SOURCES = {
    "source": None, "user": "user", "harmful": "harmful", "test": "task", "harmful_test": "harmful",
    "benign": "benign",
}  # fmt: skip
"""The role of each source among the inputs of a data step; None: the role of the step itself."""


def rehearse(planned: Plan, store: Store, *, device: str = "auto", progress: Progress | None = None) -> None:
    """Do the checks of a run for its missing steps, without writing anything into `store`.

    Raises:
        InputError: the run would be refused; `Problems` if there are several reasons.
    """
    with beside(planned.steps, store) as copy:
        missing = [step.id for step in planned.steps if store.record(step.id) is None]
        machine = Machine(device, planned.model, progress or Progress())
        found = prepare_rows([step for step in planned.steps if step.id in missing], copy, machine)
        found += check(planned, missing, copy, machine)
    refuse(located(found, planned))


@contextlib.contextmanager
def beside(steps: Iterable[Step], store: Store) -> Iterator[Store]:
    """Yield a temporary store that has links to those of the steps that `store` has."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Store(Path(folder))
        for step in steps:
            if store.record(step.id) is not None:
                copy.path(step.id).symlink_to(store.path(step.id).resolve())
        yield copy


def prepare_rows(steps: Sequence[Step], store: Store, machine: Machine) -> list[InputError]:
    """Do the steps that prepare rows, and return the problems of those that cannot be done."""
    # Rows that an attack or a filter has yet to choose with a model cannot be prepared. A step is looked at
    # after the one before it is done.
    checks = (
        partial(do, step, store, machine)
        for step in steps
        if step.kind in ROWS and all(store.record(parent) is not None for parent in parents(step))
    )
    return [problem.at("data") for problem in problems(checks)]


def check(planned: Plan, names: Collection[str], store: Store, machine: Machine) -> list[InputError]:
    """Run the checks of the steps `names`, and return their problems."""
    known = {step.id: step for step in planned.steps}
    checks = []
    for step in planned.steps:
        if step.id in names and step.check is not None:
            given = Inputs(_readable(step, known, store), store)
            checks.append(partial(_checked, step, _judge_key(step, planned.recipe), given, machine))
    machine.progress.checking(True)
    found = problems(checks)
    machine.progress.checking(False)
    return found


def _checked(step: Step, key: Sequence[str], inputs: Inputs, machine: Machine) -> None:
    assert step.check is not None
    with about(*key):
        step.check(inputs, machine)


def _judge_key(step: Step, recipe: Recipe) -> tuple[str, ...]:
    """Return the recipe key of a step's judge; () for a step without one."""
    judge = step.inputs.get("judge")
    if step.kind == "moderate" and isinstance(judge, Content):
        return "evaluation", "judges", str(recipe.evaluation.judges.index(judge.place))
    return {"rate": ("evaluation", "rater"), "filter": ("data", "filter")}.get(step.kind, ())


def _readable(step: Step, known: Mapping[str, Step], store: Store) -> Mapping[str, Any]:
    """Return the inputs of a step; rows that are yet to be chosen are those they are chosen from."""
    given = step.inputs.get("rows")

    def made(rows: Made) -> Made:
        while rows.step in known and known[rows.step].kind in ("attack", "change", "filter"):
            if store.path(rows.step).joinpath("step.json").is_file():
                break
            rows = known[rows.step].inputs["rows"]
        return rows

    if isinstance(given, Made):
        found: Any = made(given)
    else:
        found = {name: made(rows) for name, rows in given.items()} if given else given
    return step.inputs if found == given else {**step.inputs, "rows": found}


def located(found: Sequence[InputError], planned: Plan) -> list[InputError]:
    """Return problems with the line of the recipe, or the files and lines of the rows."""
    made: list[InputError] = []
    for problem in found:
        if isinstance(problem, BadRows):
            made.append(DataError(f"{problem.text(_places(problem.rows, planned))}."))
        else:
            made.append(problem.after(planned.recipe.where(problem.key)))
    return made


def _places(rows: Collection[str], planned: Plan) -> dict[str, str]:
    found: dict[str, str] = {}
    for step in planned.steps:
        if step.kind != "data" or len(found) == len(rows):
            continue
        given = step.inputs
        role, task, columns = given["role"], given.get("task"), given.get("columns")
        sources = [
            (part.place or str(planned.recipe.data.task), SOURCES[name] or role)
            for name, part in given.items()
            if name in SOURCES and isinstance(part, Content)
        ]
        used = adapted(registry.get("tasks", task.name), columns=columns) if task else None
        left = [row for row in rows if row not in found]
        found |= datasets.places_of(left, sources, task=used, kind=given.get("kind"))
    return found


def parents(step: Step) -> Iterator[str]:
    """Yield the ids of the steps that a step reads."""

    def made(value: Any) -> Iterator[str]:
        if isinstance(value, Made):
            yield value.step
        elif isinstance(value, dict):
            for part in value.values():
                yield from made(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from made(part)

    return made(step.inputs)
