"""A worker of a sweep on this machine: it runs one ready step after another until none is left.

Workers share only the files of the store and of the sweep. A worker holds the lock of the step that it runs.
The system releases the lock if the worker dies, and any other worker resumes the step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from holdfast.errors import StepFailed
from holdfast.machine.store import Store
from holdfast.pipeline.step import Busy, do
from holdfast.study import claims, job, planning
from holdfast.study import folder as files
from holdfast.study.graph import Graph
from holdfast.study.job import Noted, end_with_standard_input, failed, log_to
from holdfast.study.resources import Need

PAUSE = 0.2
"""Seconds to wait if every ready step is run by another worker."""


def work(folder: Path, number: int, log_to: Callable[[Path], None] = lambda path: None) -> None:
    """Run the steps of a sweep that are ready and that no other worker runs, until none is left.

    Args:
        folder: the folder `sweep` below the output of the sweep.
        log_to: called with the log of each step before it runs.

    Raises:
        StepFailed: the inputs changed since the sweep began.
    """
    _Worker(folder, number, log_to).work()


class _Worker:
    def __init__(self, folder: Path, number: int, log_to: Callable[[Path], None]):
        known = files.described(folder)
        self.folder, self.label = folder, f"worker-{number}"
        self.store = Store(folder / known["store"], read_only=False)
        self.study = planning.replan(known["recipes"], self.store, known["device"], known["processes"])
        if list(self.study.steps) != list(known["steps"]):
            raise StepFailed(planning.CHANGED)
        self.note = Noted(
            folder / "workers" / f"{self.label}.json", lambda step: log_to(files.log(folder, step))
        )
        machines = self.study.machines(known["device"], self.note)
        self.machine = {s.id: machines[name] for name, one in self.study.plans.items() for s in one.steps}
        self.needs = {kind: Need(**need) for kind, need in known["needs"].items()}
        self.devices = known.get("devices", [])
        self.device = self.devices[number % len(self.devices)] if self.devices else None
        self.claims = any(need.memory or need.gpus > 1 for need in self.needs.values())

    def work(self) -> None:
        graph = Graph(self.study.parents)
        seen: set[str] = set()
        busy: list[str] = []
        while graph.left:
            for failure in (now := files.failed_steps(self.folder)) - seen:
                graph.fail(failure)
            seen |= now
            name = graph.pop()
            if name is None:
                time.sleep(PAUSE if graph.left else 0)
            elif self.store.record(name) is not None:
                graph.done(name)
                continue
            else:
                if not self._do(name):
                    busy.append(name)
                    continue
                graph.done(name)
            # A step that another worker ran may be ready now, and the first ones have most behind them.
            graph.back(busy)
            busy = []

    def _do(self, name: str) -> bool:
        """Run a step; False if it is not complete afterwards."""
        need = self.needs.get(self.study.steps[name].kind, Need())
        devices: list[str] | None = []
        if self.claims:
            devices = claims.take(self.folder, self.label, need, self.device, self.devices)
            if devices is None:
                return False
        self.note.step = name
        try:
            if need.processes > 1:
                return self._together(name, need, devices or [])
            do(self.study.steps[name], self.store, self.machine[name], wait=False)
        except Busy:
            return False
        except Exception as error:
            failed(self.folder, name, error)
            self.note.end("", False, None)
            return False
        finally:
            if self.claims:
                claims.release(self.folder, self.label)
        return True

    def _together(self, name: str, need: Need, devices: list[str]) -> bool:
        """Run a step in several processes, which end with this one; False if it is not complete then."""
        environment = dict(os.environ)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        with self.store.lock(name, _busy):
            pass  # torchrun needs seconds to find that another worker runs the step
        child = job.start(self.folder, name, self.label, need.processes, tied=True, env=environment)
        code = job.wait(child, self.folder, self.label)
        if code == 0 and self.store.record(name) is not None:
            return True
        if code != job.BUSY and name not in files.failed_steps(self.folder):
            self.note.write({})  # the head counts this death in this step
            sys.exit(f"The processes of {name} ended with exit code {code}.")
        return False


def _busy() -> None:
    raise Busy("Another worker runs this step.")


def main() -> None:
    """Run a worker: `python -m holdfast.study.worker FOLDER NUMBER`; it ends if its standard input closes."""
    end_with_standard_input()
    work(Path(sys.argv[1]), int(sys.argv[2]), log_to)


if __name__ == "__main__":
    main()
