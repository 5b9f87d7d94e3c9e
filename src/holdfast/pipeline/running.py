"""Run the steps of a plan, in one process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.errors import StepFailed, refuse
from holdfast.machine.processes import Processes, launched
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline import preflight, results
from holdfast.pipeline.planning import plan
from holdfast.pipeline.plans import Plan
from holdfast.pipeline.step import Machine, Step, do, join
from holdfast.recipe import Recipe


def run(
    recipe: Recipe,
    *,
    out: str | Path,
    store: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the missing steps of `recipe` and return its results (also in `out/results.json`).

    Args:
        out: the run's folder; it is created, or continued if it already holds a run.
        store: the folder of the steps; `out/steps` by default. Runs may share it.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        InputError: an input cannot be used; raised before training starts.
        StepFailed: a step stopped before its end; running again resumes it.
    """
    out, progress, processes = Path(out), progress or Progress(), launched()
    steps = Store(Path(store) if store else out / "steps", read_only=not processes.main)
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
    recipe: Recipe, out: Path, store: Store, device: str, progress: Progress, processes: Processes
) -> dict[str, Any]:
    """Run all steps as the main process, and tell the other processes when to join in."""
    results.claim(out, store.root)
    planned = plan(recipe, download=True, digests=store.digests, today=store.started(), device=device)
    results.keep_recipe(out, planned.recipe)
    machine = Machine(device, planned.model, progress, processes)
    missing = [step for step in planned.steps if store.record(step.id) is None]
    cached = {step.id for step in planned.steps} - {step.id for step in missing}
    found = preflight.prepare_rows(planned.steps, store, machine)
    names = [step.id for step in missing if step.check is not None]
    if names:  # in all processes that train together
        machine.processes.tell({"do": "check", "steps": names})
        found += preflight.check(planned, names, store, machine)
    refuse(preflight.located(found, planned))
    for step in planned.steps:
        if step.kind not in preflight.ROWS:
            do(step, store, machine)
    return results.write(out, planned, store, cached)


def _follow(recipe: Recipe, store: Store, device: str, processes: Processes) -> dict[str, Any]:
    """Run as one of the other processes: wait, and join in the steps that run together."""
    machine: Machine | None = None
    planned: Plan | None = None
    known: dict[str, Step] = {}
    while "done" not in (order := processes.told()):
        if machine is None or planned is None:
            planned = plan(recipe, digests=store.digests, today=store.started(), device=device)
            machine = Machine(device, planned.model, Progress(), processes)
            known = {step.id: step for step in planned.steps}
        if order["do"] == "check":
            refuse(preflight.located(preflight.check(planned, order["steps"], store, machine), planned))
        elif order["do"] in known:
            join(known[order["do"]], store, machine)
        else:
            raise StepFailed(
                f"The main process runs {order['do']}, but the recipe as this process reads it has no such "
                "step. All processes need the same files, on a file system that all of them can read."
            )
    return order["done"]
