"""Run a grid on this machine: start workers, replace those that die, and write the results of each run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from holdfast.errors import OutputError, StepFailed
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store, claim_folder
from holdfast.pipeline import results
from holdfast.study import folder as files
from holdfast.study import grid, planning
from holdfast.study.folder import Status

TRIES = 3
"""The number of workers that may die in one step before it counts as failed."""

PAUSE = 0.3
"""Seconds between two looks at the workers."""


def sweep(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
    show: Callable[[Status], None] = lambda status: None,
) -> dict[str, dict[str, Any]]:
    """Run every recipe of a grid, each shared step once, and return the results by the run's folder.

    Args:
        source: a grid: a file, a packaged recipe's name or a mapping. See docs/sweep.md.
        out: the folder of the study, with one folder for each run; an earlier sweep in it is resumed.
        overrides: "key=value", for every run.
        store: the folder of the steps; `out/steps` by default.
        device: "auto", "cpu", "cuda" or "mps".
        workers: the number of steps that run at the same time; by default one for each GPU, else 1.
        progress: receives the progress of the checks.
        show: called with the state of the sweep from time to time.

    Raises:
        InputError: an input cannot be used; raised before training starts.
        StepFailed: steps failed; those that do not need them are complete. The same call goes on.
    """
    return run_all(
        grid.expand(source, overrides),
        out=out,
        store=store,
        device=device,
        workers=workers,
        progress=progress,
        show=show,
    )


def run_all(
    runs: Sequence[grid.Run],
    *,
    out: str | Path,
    store: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
    show: Callable[[Status], None] = lambda status: None,
) -> dict[str, dict[str, Any]]:
    """Run recipes as the runs of one sweep, and return the results by the run's folder; see `sweep`."""
    out = Path(out)
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
        study = planning.plan(runs, steps, device=device, download=True)
        for name, one in study.plans.items():
            results.keep_recipe(out / name, one.recipe)
        cached = study.complete(steps)
        planning.check(study, steps, device, progress)
        files.describe(folder, study, steps, device)
        head = _Head(out, study, steps, cached, show)
        if len(cached) < len(study.steps):
            head.run(_environments(device, workers))
        return head.end()
    finally:
        lock.release()


def _environments(device: str, workers: int | None) -> list[dict[str, str]]:
    """Return the environment of each worker: it sees one GPU."""
    given = dict(os.environ)
    if device not in ("auto", "cuda"):
        return [given] * (workers or 1)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [given] * (workers or 1)
    visible = given.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(count)]
    return [
        {**given, "CUDA_VISIBLE_DEVICES": devices[number % len(devices)]}
        for number in range(workers or count)
    ]


def start_worker(folder: Path, number: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker; it ends when this process ends, because its standard input closes."""
    with (folder / "logs" / f"worker-{number}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "holdfast.study.worker", str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the workers
        )


class _Head:
    """The process that starts the workers and writes the results."""

    def __init__(
        self,
        out: Path,
        study: planning.Study,
        store: Store,
        cached: set[str],
        show: Callable[[Status], None],
    ):
        self.out, self.study, self.store, self.cached, self.show = out, study, store, cached, show
        self.folder = out / files.NAME
        self.results: dict[str, dict[str, Any]] = {}
        self.deaths: Counter[str] = Counter()

    def run(self, environments: Sequence[Mapping[str, str]]) -> None:
        """Run the steps with one worker for each environment, until no worker finds a step."""
        workers = {n: start_worker(self.folder, n, env) for n, env in enumerate(environments)}
        try:
            while workers:
                for number, worker in list(workers.items()):
                    code = worker.poll()
                    if code is None:
                        continue
                    del workers[number]
                    if code != 0:
                        self._died(number, code)
                        workers[number] = start_worker(self.folder, number, environments[number])
                state = files.status(self.out)
                self.show(state)
                self._write({name for name, what in state.states.items() if what == "complete"})
                if workers:
                    time.sleep(PAUSE)
        finally:
            for worker in workers.values():
                worker.terminate()
            for worker in workers.values():
                worker.wait()
            for left in self.folder.glob("workers/*.json"):
                left.unlink()

    def _died(self, number: int, code: int) -> None:
        """Note that a worker died; a step in which several died counts as failed."""
        note = self.folder / "workers" / f"{number}.json"
        step = files.at_work(self.folder).get(str(number), {}).get("step", "")
        note.unlink(missing_ok=True)
        self.deaths[step] += 1
        if self.deaths[step] < TRIES:
            return
        where = f"in {self.study.steps[step].title}" if step else "outside a step"
        text = f"{TRIES} workers ended {where}, the last with exit code {code}"
        if not step:
            raise StepFailed(f"{text}. See {self.folder / 'logs' / f'worker-{number}.log'}.")
        files.fail(self.folder, step, text)

    def _write(self, complete: set[str]) -> None:
        """Write the results of the runs whose steps are complete."""
        for name, one in self.study.plans.items():
            if name not in self.results and complete.issuperset(step.id for step in one.steps):
                cached = self.cached & {step.id for step in one.steps}
                self.results[name] = results.write(self.out / name, one, self.store, cached)

    def end(self) -> dict[str, dict[str, Any]]:
        """Write what is left, and return the results of all runs.

        Raises:
            StepFailed: steps failed.
        """
        self._write(self.study.complete(self.store))
        failed = files.failures(self.folder)
        if failed:
            lines = [
                f"- {self.study.steps[name].title}: {message}\n  log: {files.log(self.folder, name)}"
                for name, message in failed.items()
            ]
            left = len(self.study.plans) - len(self.results)
            text = f"{len(failed)} steps failed, so {left} of {len(self.study.plans)} runs are not complete"
            raise StepFailed("\n".join([f"{text}. Run the same command again to go on.", *lines]))
        return self.results
