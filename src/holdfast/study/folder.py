"""The folder of a sweep: its steps and runs, which steps failed, and what each worker does.

Everything is a file, so that workers, the command that started them and `--status` need no connection:
`study.json` (the steps and the recipes), `workers/LABEL.json`, `failed/STEP.json` and `logs/`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from holdfast.errors import OutputError
from holdfast.machine.files import read_json, write_json
from holdfast.machine.store import Store
from holdfast.study.graph import Graph
from holdfast.study.planning import Study
from holdfast.study.resources import TRAINED, Launcher, Need

NAME = "sweep"
"""The folder's name below `--out`, and its kind."""

BEAT = 10.0
"""Seconds between two signs of life of a job on another machine."""

SILENT = 90.0
"""Seconds without a sign after which a job counts as dead."""


def describe(
    folder: Path,
    study: Study,
    store: Store,
    device: str,
    needs: Mapping[str, Need],
    *,
    launcher: Launcher | None = None,
    devices: Sequence[str] = (),
) -> None:
    """Write `study.json`, and forget the workers and failures of an earlier start.

    Args:
        needs: by kind of step, what it needs.
        devices: the GPUs of this machine, if it runs the steps.
    """
    for part in ("workers", "failed", "logs"):
        (folder / part).mkdir(exist_ok=True)
    gone = list(folder.glob("failed/*.json"))
    launcher = launcher or Launcher()
    # The jobs of a cluster run on without the command that submitted them.
    silent = time.time() - SILENT if launcher.name != "local" else time.time()
    gone += [note for note in folder.glob("workers/*.json") if note.stat().st_mtime <= silent]
    for old in gone:
        old.unlink(missing_ok=True)
    known = {
        "store": os.path.relpath(store.root, folder),
        "device": device,
        "launcher": launcher.name,
        "workers": launcher.workers,
        "devices": list(devices),
        "needs": {kind: asdict(need) for kind, need in needs.items()},
        "processes": {kind: needs[kind].processes for kind in TRAINED},
        "recipes": {name: one.recipe.to_dict() for name, one in study.plans.items()},
        "steps": {
            name: {"kind": step.kind, "title": step.title, "parents": study.parents[name]}
            for name, step in study.steps.items()
        },
        "runs": {name: [step.id for step in one.steps] for name, one in study.plans.items()},
    }
    write_json(folder / "study.json", known)


def described(folder: Path) -> dict[str, Any]:
    """Return what `describe` wrote.

    Raises:
        OutputError: there is no sweep.
    """
    try:
        return read_json(folder / "study.json")
    except (OSError, ValueError):
        text = f"Expected the folder of a sweep (the --out of holdfast sweep), found none: {folder.parent}."
        raise OutputError(text) from None


def lock(folder: Path) -> FileLock:
    """Return the lock that a sweep holds while it runs."""
    return FileLock(folder / ".lock")


def _locked(folder: Path) -> bool:
    try:
        with lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def fail(folder: Path, step: str, message: str) -> None:
    """Note that a step failed; its log is `logs/STEP.log`."""
    write_json(folder / "failed" / f"{step}.json", {"message": message})


def failed_steps(folder: Path) -> set[str]:
    """Return the names of the failed steps."""
    try:
        return {
            name.removesuffix(".json") for name in os.listdir(folder / "failed") if name.endswith(".json")
        }
    except FileNotFoundError:
        return set()


def failures(folder: Path) -> dict[str, str]:
    """Return the message of each failed step."""
    found = {}
    for name in sorted(failed_steps(folder)):
        with contextlib.suppress(OSError, ValueError):  # it is being written
            found[name] = read_json(folder / "failed" / f"{name}.json")["message"]
    return found


def log(folder: Path, step: str) -> Path:
    """Return the log of a step."""
    return folder / "logs" / f"{step}.log"


def at_work(folder: Path, since: float | None = None) -> dict[str, dict[str, Any]]:
    """Return what each worker or job does, by its label.

    Args:
        since: leave out those that gave no sign of life after this time.
    """
    found = {}
    for path in sorted(folder.glob("workers/*.json")):
        with contextlib.suppress(OSError, ValueError):
            if since is None or path.stat().st_mtime >= since:
                found[path.stem] = read_json(path)
    return found


@dataclass(frozen=True)
class Status:
    """The state of a sweep.

    Attributes:
        states: by step, "complete", "running", "failed", "stopped" (it needs a failed step) or "waiting".
        titles: by step, its title, and the run that it belongs to or the number of its runs.
        workers: by number of the worker, its step and progress.
        failed: by failed step, the message.
        runs: the number of runs, and of complete ones.
        alive: whether the command that started the workers still runs.
    """

    states: Mapping[str, str]
    titles: Mapping[str, str]
    workers: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    runs: tuple[int, int]
    alive: bool = True

    def counts(self) -> dict[str, int]:
        """Return the number of steps by state."""
        return dict(Counter(self.states.values()))


def status(out: Path) -> Status:
    """Return the state of the sweep in `out`, which may still run.

    Raises:
        OutputError: there is no sweep.
    """
    return Watch(out).look()


def _of_runs(title: str, runs: Sequence[str]) -> str:
    return f"{title}, {runs[0]}" if len(runs) == 1 else f"{title}, {len(runs)} runs"


class Watch:
    """Looks at a sweep again and again; a step that was complete once is not looked at again."""

    def __init__(self, out: Path, *, alive: bool | None = None):
        """Read what the sweep is.

        Args:
            alive: whether the command that started the sweep runs; by default its lock tells.
        """
        self.folder, self.alive = out / NAME, alive
        self.known = described(self.folder)
        self.store = self.folder / self.known["store"]
        self.graph = Graph({name: step["parents"] for name, step in self.known["steps"].items()})
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.left = {name: len(set(steps)) for name, steps in self.known["runs"].items()}
        self.users: dict[str, list[str]] = {}
        for name, steps in self.known["runs"].items():
            for step in set(steps):
                self.users.setdefault(step, []).append(name)
        steps = self.known["steps"]
        self.titles = {
            name: _of_runs(step["title"], self.users.get(name, [])) for name, step in steps.items()
        }
        self.finished: list[str] = [name for name, left in self.left.items() if not left]

    def look(self) -> Status:
        """Return the state now."""
        steps = self.known["steps"]
        for name in [name for name in steps if name not in self.done]:
            if os.path.isfile(self.store / name / "step.json"):
                self.complete(name)
        for name in failed_steps(self.folder) - self.failed.keys():
            self.failed |= {k: v for k, v in failures(self.folder).items() if k == name}
            if name in steps:
                self.graph.fail(name)
        alive = _locked(self.folder) if self.alive is None else self.alive
        notes: dict[str, dict[str, Any]] = {}  # those of a killed sweep say nothing
        if self.known["launcher"] != "local":
            notes = at_work(self.folder, time.time() - SILENT)
        elif alive:
            notes = at_work(self.folder)
        busy = {n: one for n, one in notes.items() if one["step"] in steps and one["step"] not in self.done}
        running = {one["step"] for one in busy.values()}

        def state(name: str) -> str:
            if name in self.done:
                return "complete"
            if name in self.failed:
                return "failed"
            return "running" if name in running else "stopped" if name in self.graph.stopped else "waiting"

        counted = len(self.known["runs"]), len(self.finished)
        return Status({n: state(n) for n in steps}, self.titles, busy, dict(self.failed), counted, alive)

    def complete(self, name: str) -> None:
        """Note that a step is complete."""
        self.done.add(name)
        self.graph.done(name)
        for run in self.users.get(name, ()):
            self.left[run] -= 1
            if not self.left[run]:
                self.finished.append(run)
