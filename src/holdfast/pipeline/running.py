"""Doing the steps of a plan, in one process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.errors import StepFailed
from holdfast.machine.processes import Processes, launched
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline import preflight
from holdfast.pipeline.context import Context
from holdfast.pipeline.planning import plan
from holdfast.pipeline.step import do, join
from holdfast.recipe import Recipe


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
    from holdfast.pipeline import results

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
