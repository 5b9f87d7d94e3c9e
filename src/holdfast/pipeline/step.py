"""A step of a run. Its named inputs are everything that it can read, and their hash is its name.

A step's `work` is a function of this package that gets its inputs, its folder and the machine. It reaches
no recipe and no other step, so that what a step does and what names it cannot differ. An input is

- a plain value (text, numbers, lists, mappings), which names itself;
- `Content`: a model, a file or another thing at some place, named by what it holds;
- `Made`: an earlier step, named by that step's own name; the work gets its folder;
- `Code`: a method, a judge or a task, named by its version and its code; the work gets the object.

`Machine` holds what changes only the speed: the device, the processes, the progress display.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import HoldfastError, StepFailed
from holdfast.machine.processes import Processes
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store, identity_hash, provenance
from holdfast.pipeline.versions import version

FORMAT = {
    "data": 2, "manifest": 2, "attack": 2, "filter": 2, "alignment": 3, "user": 3, "post_hoc": 2,
    "generate": 3, "moderate": 2, "rate": 2, "score": 4,
}  # fmt: skip
"""By kind of step. Increase a number when a step of that kind makes something else of the same inputs."""


@dataclass(frozen=True)
class Content:
    """An input that lies at `place` and is named by `digest`, a plain value; moving it changes no name."""

    place: Any
    digest: Any


@dataclass(frozen=True)
class Made:
    """The folder of an earlier step, by that step's id."""

    step: str


@dataclass(frozen=True)
class Code:
    """A defense, a judge or a task of the registry; `group` is "defenses", "judges" or "tasks"."""

    group: str
    name: str


def identity(value: Any) -> Any:
    """The plain value that names an input."""
    if isinstance(value, Content):
        return identity(value.digest)
    if isinstance(value, Made):
        return {"step": value.step}
    if isinstance(value, Code):
        return version(value.group, value.name)
    if isinstance(value, Mapping):
        return {key: identity(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [identity(part) for part in value]
    return value


def opened(value: Any, store: Store) -> Any:
    """What the work gets of an input."""
    if isinstance(value, Content):
        return value.place
    if isinstance(value, Made):
        return store.path(value.step)
    if isinstance(value, Code):
        return registry.get(value.group, value.name)
    if isinstance(value, Mapping):
        return {key: opened(part, store) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [opened(part, store) for part in value]
    return value


class Inputs(Mapping[str, Any]):
    """The opened inputs of a step, each when it is first asked for; `read` holds the names asked for."""

    def __init__(self, named: Mapping[str, Any], store: Store):
        self._named, self._store = named, store
        self._opened: dict[str, Any] = {}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        if name not in self._opened:
            self._opened[name] = opened(self._named[name], self._store)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


@dataclass
class Machine:
    """What a step may use and what changes only its speed."""

    device_asked: str
    model: Path
    progress: Progress = field(default_factory=Progress)
    processes: Processes = field(default_factory=Processes)

    @cached_property
    def device(self) -> str:
        """The device to compute on, chosen (and CPU threads set) at first use."""
        from holdfast.models.device import choose_device

        return choose_device(self.device_asked, self.model, self.processes)


Work = Callable[[Inputs, Path, Machine], Mapping[str, Any] | None]
Check = Callable[[Inputs, Machine], None]


@dataclass(frozen=True)
class Step:
    """A step: `work(inputs, folder, machine)` fills the folder and returns facts for `step.json`.

    Attributes:
        title, detail: what `plan` and the progress display show; they name nothing.
        check: finds what would stop the step before any step is done that costs something.
        together: all processes of a run do it at the same time; the main one does any other step alone.
    """

    kind: str
    title: str
    detail: str
    inputs: Mapping[str, Any]
    work: Work
    check: Check | None = None
    together: bool = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The plain values that name the step."""
        return {"kind": self.kind, "format": FORMAT[self.kind], "inputs": identity(self.inputs)}

    @cached_property
    def id(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{identity_hash(self.identity)}"


def do(step: Step, store: Store, machine: Machine) -> None:
    """One step under its lock, unless it is complete; nothing else writes `step.json`.

    Raises:
        StepFailed: it stopped half-way; doing it again goes on from there.
    """
    progress = machine.progress
    if store.record(step.id) is not None:
        progress.end(step.title, True, None)
        return

    def waiting() -> None:
        progress.say(f"Waiting for another run that does: {step.title}")

    with _explained(step, store), store.lock(step.id, waiting):
        if store.record(step.id) is not None:
            progress.end(step.title, True, None)
            return
        folder = store.path(step.id)
        progress.begin(step.title, store.begun(step.id))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.json").unlink(missing_ok=True)
        record, began = provenance(), time.monotonic()
        if step.together:
            machine.processes.tell({"do": step.id})
        facts = dict(step.work(Inputs(step.inputs, store), folder, machine) or {})
        seconds = facts.pop("seconds", time.monotonic() - began)
        store.complete(
            step.id,
            {"kind": step.kind, "title": step.title, "identity": step.identity, "seconds": seconds,
             **facts, "provenance": record},
        )  # fmt: skip
        progress.end(step.title, False, seconds)


def join(step: Step, store: Store, machine: Machine) -> None:
    """Take part in a step that the main process does."""
    with _explained(step, store):
        step.work(Inputs(step.inputs, store), store.path(step.id), machine)


@contextlib.contextmanager
def _explained(step: Step, store: Store) -> Iterator[None]:
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        raise StepFailed(_why(step, store, error)) from error


def _why(step: Step, store: Store, error: Exception) -> str:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    # Some writers do not say why they failed.
    if full or "No space left" in str(error) or shutil.disk_usage(store.root).free < 2**20:
        return (
            f"No space left on the disk that holds {store.root}, while doing: {step.title}. Free some space "
            "and run the same command again: it goes on from what is there."
        )
    return (
        f"{step.title} failed: {type(error).__name__}: {text}\n"
        f"What is done is kept in {store.path(step.id)}; "
        "run the same command again to go on (--debug shows where it failed)."
    )
