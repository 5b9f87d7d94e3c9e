"""One step of a sweep in a process of its own, or in several that train together.

`python -m holdfast.study.job FOLDER STEP LABEL` runs the step, under torchrun in several processes. A
launcher starts it through `supervise`, which tries again if the process dies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, StepFailed
from holdfast.machine.files import write_json
from holdfast.machine.processes import Processes, launched
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline.step import Busy, Machine, do, join
from holdfast.study import folder as files
from holdfast.study import planning

TRIES = 3
"""The number of processes that may die in one step before it counts as failed."""

BUSY = 75
"""The exit code of a job whose step another process runs."""

EVERY = 1.0
"""Seconds between two notes of a step's progress."""


class Noted(Progress):
    """Writes to a file what a worker or a job does.

    Args:
        beats: whether to touch the file from time to time: from another machine, nothing else shows that the
            process is alive.
    """

    def __init__(self, path: Path, log: Callable[[str], None], *, beats: bool = False):
        self.path, self.log, self.step = path, log, ""
        self.written, self.began = 0.0, 0.0
        if beats:
            threading.Thread(target=self._beat, daemon=True).start()

    def begin(self, title: str, resumed: bool) -> None:
        """Note the step, and open its log."""
        self.log(self.step)
        self.began = time.time()
        self.write({})

    def advance(self, done: int, total: int, **facts: Any) -> None:
        """Note the progress of the step from time to time."""
        if time.monotonic() - self.written >= EVERY:
            self.write({"done": done, "total": total})

    def end(self, title: str, cached: bool, seconds: float | None) -> None:
        """Note that the process has no step."""
        self.path.unlink(missing_ok=True)

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write the file."""
        self.written = time.monotonic()
        write_json(self.path, {"step": self.step, "pid": os.getpid(), "began": self.began, **facts})

    def _beat(self) -> None:
        while True:
            time.sleep(files.BEAT)
            with contextlib.suppress(OSError):
                os.utime(self.path)


def run(folder: Path, step: str, label: str, log_to: Callable[[Path], None] = lambda path: None) -> None:
    """Run a step of a sweep, unless it is complete or the sweep has it no longer.

    A failure is noted in the folder of the sweep.

    Args:
        folder: the folder `sweep` below the output of the sweep.
        label: the name of the note about this job.
        log_to: called with the log of the step before it runs.

    Raises:
        Busy: another process runs the step.
        HoldfastError: the step failed.
    """
    known = files.described(folder)
    if step not in known["steps"]:
        return
    processes = launched()
    processes.start()
    path = folder / "workers" / f"{label}.json"
    note = Noted(path, lambda name: log_to(files.log(folder, name)), beats=processes.main)
    note.step = step
    try:
        _run(known, folder, step, note, processes)
        processes.finish()
    except BaseException as error:
        if processes.main:
            note.path.unlink(missing_ok=True)
        if isinstance(error, Busy) and processes.count > 1:
            _busy_file(folder, label).touch()
        if processes.speaks() and isinstance(error, Exception) and not isinstance(error, Busy):
            failed(folder, step, error)
        raise


def _run(known: Mapping[str, Any], folder: Path, step: str, note: Noted, processes: Processes) -> None:
    store = Store(folder / known["store"], read_only=not processes.main)
    if processes.main and store.record(step) is not None:
        processes.tell({"done": True})
        return
    name = next(name for name, steps in known["runs"].items() if step in steps)
    study = planning.replan({name: known["recipes"][name]}, store, known["device"], known["processes"])
    if step not in study.steps:
        raise StepFailed(planning.CHANGED)
    # A step without a GPU, such as scores, may run on a machine that has none.
    device = known["device"] if known["needs"][study.steps[step].kind]["gpus"] else "auto"
    machine = Machine(device, study.plans[name].model, note if processes.main else Progress(), processes)
    if not processes.main:
        while "done" not in processes.told():
            join(study.steps[step], store, machine)
        return
    do(study.steps[step], store, machine, wait=False)
    processes.tell({"done": True})


def failed(folder: Path, step: str, error: Exception) -> None:
    """Note a step that raised an error."""
    with files.log(folder, step).open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    files.fail(folder, step, str(error) if isinstance(error, HoldfastError) else repr(error))


def command(folder: Path, step: str, label: str, processes: int, *, tied: bool = False) -> list[str]:
    """Return the command that runs a step.

    Args:
        processes: the number of processes, which torchrun starts if there are several.
        tied: end the processes when their standard input closes.
    """
    module = ["-m", "holdfast.study.job", str(folder), step, label, *(["--tied"] if tied else [])]
    if processes == 1:
        return [sys.executable, "-P", "-W", "ignore", *module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, "-P", "-W", "ignore", *torchrun, *module]


def _busy_file(folder: Path, label: str) -> Path:
    """Return the file that reports the exit code BUSY, because torchrun itself always ends with 1."""
    return folder / "workers" / f"{label}.busy"


def start(
    folder: Path, step: str, label: str, processes: int, *, tied: bool = False, **options: Any
) -> subprocess.Popen[bytes]:
    """Start the processes of a step, which write to its log.

    Args:
        tied: end them when their standard input, a pipe, closes.
        options: for `Popen`.
    """
    _busy_file(folder, label).unlink(missing_ok=True)
    given = subprocess.PIPE if tied else subprocess.DEVNULL
    asked = command(folder, step, label, processes, tied=tied)
    with files.log(folder, step).open("ab") as log:
        return subprocess.Popen(asked, stdin=given, stdout=log, stderr=log, **options)


def wait(child: subprocess.Popen[bytes], folder: Path, label: str) -> int:
    """Wait for the processes that `start` started, and return their exit code."""
    code = child.wait()
    busy = _busy_file(folder, label)
    if code != 0 and busy.exists():
        busy.unlink(missing_ok=True)
        return BUSY
    return code


def supervise(
    folder: Path,
    step: str,
    label: str,
    processes: int,
    *,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
    died: Callable[[int], None] = lambda code: None,
) -> None:
    """Run a step in processes of its own, again if they die; returns when it is complete.

    Args:
        started: called with each process.
        died: called with the exit code of a process that died.

    Raises:
        Busy: another process runs the step.
        StepFailed: the step failed; the folder of the sweep has a note about it.
    """
    code = 0
    for _ in range(TRIES):
        child = start(folder, step, label, processes)
        started(child)
        code = wait(child, folder, label)
        if code == 0:
            return
        if code == BUSY:
            raise Busy(f"Another process runs this step: {step}")
        if step in files.failed_steps(folder):
            raise StepFailed(files.failures(folder)[step])
        died(code)
    text = f"{TRIES} processes ended in this step, the last with exit code {code}"
    files.fail(folder, step, text)
    raise StepFailed(text)


def main() -> None:
    """Run a step; the exit code is 0 if it is complete, BUSY if another process runs it, else 1."""
    place, step, label = sys.argv[1:4]
    if "--tied" in sys.argv:
        end_with_standard_input()
    try:
        run(Path(place), step, label, log_to)
    except Busy:
        sys.exit(BUSY)
    except Exception:  # it is noted
        sys.exit(1)


def end_with_standard_input() -> None:
    """End this process when its standard input closes, which happens when the one that started it ends."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: a thread that holds its lock aborts the end of the process
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def log_to(path: Path) -> None:
    """Send all output of this process to a file, also that of libraries in C."""
    with path.open("ab") as file:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send all output of this process to a file until the block ends."""
    kept = os.dup(1), os.dup(2)
    try:
        log_to(path)
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for one in kept:
            os.close(one)


if __name__ == "__main__":
    main()
