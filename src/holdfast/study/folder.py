"""The folder of a sweep: its steps and runs, which steps failed, and what each worker does.

Everything is a file, so that workers, the command that started them and `--status` need no connection:
`study.json` (the steps and the recipes), `workers/N.json`, `failed/STEP.json` and `logs/`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from holdfast.errors import OutputError
from holdfast.machine.files import read_json, write_json
from holdfast.machine.store import Store
from holdfast.study.planning import Study

NAME = "sweep"
"""The folder's name below `--out`, and its kind."""


def describe(folder: Path, study: Study, store: Store, device: str) -> None:
    """Write `study.json`, and forget the workers and failures of an earlier start."""
    for part in ("workers", "failed", "logs"):
        (folder / part).mkdir(exist_ok=True)
    for old in [*folder.glob("workers/*.json"), *folder.glob("failed/*.json")]:
        old.unlink()
    known = {
        "store": os.path.relpath(store.root, folder),
        "device": device,
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


def failures(folder: Path) -> dict[str, str]:
    """Return the message of each failed step."""
    return {path.stem: read_json(path)["message"] for path in sorted(folder.glob("failed/*.json"))}


def log(folder: Path, step: str) -> Path:
    """Return the log of a step."""
    return folder / "logs" / f"{step}.log"


def at_work(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what each worker does, by its number."""
    found = {}
    for path in sorted(folder.glob("workers/*.json")):
        with contextlib.suppress(OSError, ValueError):
            found[path.stem] = read_json(path)
    return found


def beyond(failed: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the steps that need a failed step."""
    found: set[str] = set()
    for name, step in steps.items():  # in the order of the graph
        if any(parent in found or parent in failed for parent in step["parents"]):
            found.add(name)
    return found


@dataclass(frozen=True)
class Status:
    """The state of a sweep.

    Attributes:
        states: by step, "complete", "running", "failed", "stopped" (it needs a failed step) or "waiting".
        titles: by step, its title.
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
    folder = out / NAME
    known = described(folder)
    store, steps = folder / known["store"], known["steps"]
    failed = failures(folder)
    done = {name for name in steps if (store / name / "step.json").is_file()}
    alive = _locked(folder)
    notes = at_work(folder) if alive else {}  # those of a killed sweep say nothing
    busy = {n: one for n, one in notes.items() if one["step"] in steps and one["step"] not in done}
    running = {one["step"] for one in busy.values()}
    stopped = beyond(failed, steps)

    def state(name: str) -> str:
        if name in done:
            return "complete"
        if name in failed:
            return "failed"
        return "running" if name in running else "stopped" if name in stopped else "waiting"

    complete = sum(done.issuperset(ids) for ids in known["runs"].values())
    titles = {name: step["title"] for name, step in steps.items()}
    return Status({n: state(n) for n in steps}, titles, busy, failed, (len(known["runs"]), complete), alive)
