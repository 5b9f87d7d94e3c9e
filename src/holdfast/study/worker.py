"""A worker of a sweep: it runs one ready step after another until none is left.

Workers share only the files of the store and of the sweep. A worker holds the lock of the step that it runs.
The system releases the lock if the worker dies, and any other worker resumes the step.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, StepFailed
from holdfast.machine.files import write_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline.step import Busy, do
from holdfast.study import folder as files
from holdfast.study import planning

PAUSE = 0.2
"""Seconds to wait if every ready step is run by another worker."""

EVERY = 1.0
"""Seconds between two notes of a step's progress."""


class Noted(Progress):
    """Writes to a file what the worker does."""

    def __init__(self, path: Path, log: Callable[[str], None]):
        self.path, self.log, self.step = path, log, ""
        self.written, self.began = 0.0, 0.0

    def begin(self, title: str, resumed: bool) -> None:
        """Note the step, and open its log."""
        self.log(self.step)
        self.began = time.time()
        self._write({})

    def advance(self, done: int, total: int, **facts: Any) -> None:
        """Note the progress of the step from time to time."""
        if time.monotonic() - self.written >= EVERY:
            self._write({"done": done, "total": total})

    def end(self, title: str, cached: bool, seconds: float | None) -> None:
        """Note that the worker has no step."""
        self.path.unlink(missing_ok=True)

    def _write(self, facts: dict[str, Any]) -> None:
        self.written = time.monotonic()
        write_json(self.path, {"step": self.step, "pid": os.getpid(), "began": self.began, **facts})


def work(folder: Path, number: int, log_to: Callable[[Path], None] = lambda path: None) -> None:
    """Run the steps of a sweep that are ready and that no other worker runs, until none is left.

    Args:
        folder: the folder `sweep` below the output of the sweep.
        log_to: called with the log of each step before it runs.

    Raises:
        StepFailed: the inputs changed since the sweep began.
    """
    known = files.described(folder)
    store = Store(folder / known["store"], read_only=False)
    study = planning.replan(known["recipes"], store, known["device"])
    if list(study.steps) != list(known["steps"]):
        raise StepFailed("The files of the recipes changed since the sweep began. Start the sweep again.")
    progress = Noted(folder / "workers" / f"{number}.json", lambda step: log_to(files.log(folder, step)))
    machines = study.machines(known["device"], progress)
    machine_of = {step.id: machines[name] for name, one in study.plans.items() for step in one.steps}
    done: set[str] = set()
    while True:
        failed = files.failures(folder)
        out = {*failed, *files.beyond(failed, known["steps"])}
        left = [name for name in study.steps if name not in done and name not in out]
        if not left:
            return
        ran = False
        for name in left:
            if not done.issuperset(study.parents[name]):
                continue
            if store.record(name) is not None:
                done.add(name)
                continue
            progress.step = name
            try:
                do(study.steps[name], store, machine_of[name], wait=False)
            except Busy:
                continue
            except Exception as error:
                _failed(folder, name, error)
                progress.end("", False, None)
            ran = True
            break  # a step that was waiting may be ready now, and the first ones have most behind them
        if not ran and not done.issuperset(left):
            time.sleep(PAUSE)


def _failed(folder: Path, step: str, error: Exception) -> None:
    with files.log(folder, step).open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    files.fail(folder, step, str(error) if isinstance(error, HoldfastError) else repr(error))


def main() -> None:
    """Run a worker: `python -m holdfast.study.worker FOLDER NUMBER`; it ends if its standard input closes."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    work(Path(sys.argv[1]), int(sys.argv[2]), _log_to)


def _end_with_the_sweep() -> None:
    os.read(0, 1)  # not sys.stdin: a thread that holds its lock aborts the end of the process
    os._exit(1)


def _log_to(path: Path) -> None:
    """Send all output of this process to a file, also that of libraries in C."""
    with path.open("ab") as file:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)


if __name__ == "__main__":
    main()
