"""Run a grid: plan and check it, let a launcher run the steps, and write the results of each run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from holdfast.errors import OutputError, RecipeError, StepFailed
from holdfast.machine.files import remove_tree
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store, claim_folder
from holdfast.pipeline import results
from holdfast.study import folder as files
from holdfast.study import grid, local, planning, resources
from holdfast.study.folder import Status, Watch
from holdfast.study.launching import Engine, Sweep
from holdfast.study.resources import KINDS


def sweep(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    launcher: str | None = None,
    progress: Progress | None = None,
    show: Callable[[Status], None] = lambda status: None,
) -> dict[str, dict[str, Any]]:
    """Run every recipe of a grid, each shared step once, and return the results by the run's folder.

    Args:
        source: a grid: a file, the name of a packaged grid or recipe, or a mapping. See docs/sweep.md.
        out: the folder of the study, with one folder for each run; an earlier sweep in it is resumed.
        overrides: "key=value", for every run.
        store: the folder of the steps; `out/steps` by default.
        device: "auto", "cpu", "cuda" or "mps". On a cluster, "auto" is "cuda" unless no step needs a GPU.
        workers: the number of steps that run at the same time; by default one for each GPU of this machine,
            else 1, and on a cluster as many as it has room for.
        launcher: "local", "slurm" or "ray"; by default the `name` in the grid's block `launcher`, or "local".
        progress: receives the progress of the checks.
        show: called with the state of the sweep from time to time.

    Raises:
        InputError: an input cannot be used; raised before training starts.
        StepFailed: steps failed; those that do not need them are complete. The same call goes on.
    """
    block = grid.launcher(source, launcher, overrides)
    if workers is not None:
        block = block.model_copy(update={"workers": workers})
    return run_all(
        grid.expand(source, overrides),
        out=out,
        store=store,
        device=device,
        launcher=block,
        progress=progress,
        show=show,
    )


def run_all(
    runs: Sequence[grid.Run],
    *,
    out: str | Path,
    launcher: resources.Launcher,
    store: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    show: Callable[[Status], None] = lambda status: None,
) -> dict[str, dict[str, Any]]:
    """Run recipes as the runs of one sweep, and return the results by the run's folder; see `sweep`."""
    block = launcher
    device = resources.placed(block, device)
    out = Path(out).absolute() if block.name != "local" else Path(out)
    folder, steps = out / files.NAME, Store(Path(store) if store else out / "steps", read_only=False)
    claim_folder(folder, "sweep")
    for run in runs:
        results.claim(out / run.folder, steps.root)
    lock = files.lock(folder)
    try:
        lock.acquire(timeout=1)  # --status holds it for a moment
    except Timeout:
        raise OutputError(f"Another sweep runs in {out}. Watch it: holdfast sweep --status {out}") from None
    try:
        needs = {kind: block.need(kind, device) for kind in KINDS}
        study = planning.plan(runs, steps, device=device, download=True, processes=block.together(device))
        for name, one in study.plans.items():
            results.keep_recipe(out / name, one.recipe)
        cached = study.complete(steps)
        found = local.devices(device) if block.name == "local" else ()
        engine = _engine(Sweep(out, folder, study, block, needs, found))
        _forget_damaged(study, steps, cached, progress)
        planning.check(study, steps, device if block.name == "local" else "auto", progress)
        files.describe(folder, study, steps, device, needs, launcher=block, devices=found)
        head = _Head(out, study, steps, cached, show)
        if len(cached) < len(study.steps):
            head.run(engine)
        return head.end()
    finally:
        lock.release()


def _forget_damaged(study: planning.Study, store: Store, cached: set[str], progress: Progress | None) -> None:
    """Remove steps whose files were changed, so that they count as missing."""
    for name in study.steps.keys() - cached:
        damage = store.damage(name)
        if damage is not None:
            with store.lock(name):
                remove_tree(store.path(name))
            if progress is not None:
                progress.say(f"{study.steps[name].title} is done again: it is damaged ({damage}).")


def _engine(sweep: Sweep) -> Engine:
    """Return what runs the steps.

    Raises:
        RecipeError: the launcher is not installed, or this machine has too few GPUs.
    """
    if sweep.launcher.name == "local":
        return local.Workers(sweep)
    try:
        if sweep.launcher.name == "slurm":
            from holdfast.study.slurm import Jobs

            return Jobs(sweep)
        from holdfast.study.ray import Tasks

        return Tasks(sweep)
    except ModuleNotFoundError as error:
        text = f"The launcher {sweep.launcher.name} needs the package {error.name}"
        raise RecipeError(f"{text}: pip install 'holdfast[{sweep.launcher.name}]'") from None


class _Head:
    """The process that watches the steps and writes the results."""

    def __init__(
        self,
        out: Path,
        study: planning.Study,
        store: Store,
        cached: set[str],
        show: Callable[[Status], None],
    ):
        self.out, self.study, self.store, self.cached, self.show = out, study, store, cached, show
        self.results: dict[str, dict[str, Any]] = {}
        self.watch = Watch(out, alive=True)
        self.finished: list[str] = []

    def run(self, engine: Engine) -> None:
        """Let an engine run the steps, until none can run."""
        engine.begin()
        try:
            alive = True
            while alive:
                status = self.watch.look()
                alive = engine.poll(status)
                self.show(self.watch.look() if not alive else status)
                self._write()
                if alive:
                    time.sleep(engine.pause)
        finally:
            engine.end()

    def _write(self) -> None:
        """Write the results of the runs whose steps are complete."""
        self.finished += self.watch.finished
        self.watch.finished.clear()
        for name in list(self.finished):
            one = self.study.plans[name]
            if all(self.store.record(step.id) is not None for step in one.steps):
                cached = self.cached & {step.id for step in one.steps}
                self.results[name] = results.write(self.out / name, one, self.store, cached)
                self.finished.remove(name)

    def end(self) -> dict[str, dict[str, Any]]:
        """Write what is left, and return the results of all runs.

        Raises:
            StepFailed: steps failed.
        """
        self.watch.look()
        self._write()
        failed = files.failures(self.watch.folder)
        if failed:
            lines = [
                f"- {self.study.steps[name].title}: {message}\n  log: {files.log(self.watch.folder, name)}"
                for name, message in failed.items()
            ]
            left = len(self.study.plans) - len(self.results)
            text = f"{len(failed)} steps failed, so {left} of {len(self.study.plans)} runs are not complete"
            raise StepFailed("\n".join([f"{text}. Run the same command again to go on.", *lines]))
        return {name: self.results[name] for name in self.study.plans if name in self.results}
