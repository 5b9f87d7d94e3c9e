"""A step of a run. Its named inputs are everything that it can read, and their hash is its name.

A step's `work` is a function of this package that gets its inputs, its folder and the machine. It has no
access to the recipe or to other steps, so it can use nothing that is not part of the name. An input is

- a plain value (text, numbers, lists, mappings), which identifies itself;
- `Content`: a model, a file or other data at some place, identified by its content;
- `Made`: an earlier step, identified by that step's name; the work gets its folder;
- `Code`: a method, a judge or a task, identified by its version and its code; the work gets the object.

`Machine` holds the objects that affect only the speed: the device, the processes, the progress display.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.errors import HoldfastError, StepFailed
from holdfast.machine.files import remove_tree
from holdfast.machine.processes import Processes
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store, identity_hash, provenance
from holdfast.pipeline.versions import version

FORMAT = {
    "data": 4, "manifest": 3, "attack": 5, "change": 1, "filter": 4, "alignment": 6, "user": 6, "harden": 1,
    "harmful_adapter": 1, "refusal_adapter": 1, "post_hoc": 3, "tamper": 1, "generate": 6, "moderate": 2,
    "rate": 2, "score": 4, "lm_eval": 1,
}  # fmt: skip
"""By kind of step. Increase a number when that kind of step produces other content for the same inputs."""


@dataclass(frozen=True)
class Content:
    """An input at `place` that is identified by `digest`, a plain value; moving it changes no name."""

    place: Any
    digest: Any


@dataclass(frozen=True)
class Made:
    """The folder of an earlier step, given by the id of that step."""

    step: str


@dataclass(frozen=True)
class Code:
    """A defense, an attack, a judge or a task: `group` is a group of the registry, such as "defenses"."""

    group: str
    name: str


def identity(value: Any) -> Any:
    """Return the plain value that identifies an input."""
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
    """Return an input in the form in which the work gets it."""
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
    """The inputs of a step, each opened when it is first read; `read` holds the names that were read."""

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
    """The objects that every step can use and that affect only its speed."""

    device_asked: str
    model: Path
    progress: Progress = field(default_factory=Progress)
    processes: Processes = field(default_factory=Processes)
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def device(self) -> str:
        """The device to compute on; the first use chooses it and sets the number of CPU threads."""
        from holdfast.models.device import choose_device

        return choose_device(self.device_asked, self.model, self.processes)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this key the first time, for checks that several steps share."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


Work = Callable[[Inputs, Path, Machine], Mapping[str, Any] | None]
Check = Callable[[Inputs, Machine], None]


@dataclass(frozen=True)
class Step:
    """A step: `work(inputs, folder, machine)` fills the folder and returns facts for `step.json`.

    Attributes:
        title, detail: texts for `plan` and the progress display; they are not part of the step's name.
        check: raises for problems that would stop the step; it is called before any expensive step runs.
        together: all processes of a run run it at the same time; the main one runs other steps alone.
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
        """The plain values from which the step's name is computed."""
        return {"kind": self.kind, "format": FORMAT[self.kind], "inputs": identity(self.inputs)}

    @cached_property
    def id(self) -> str:
        """The name of the step's folder."""
        return f"{self.kind}-{identity_hash(self.identity)}"


class Busy(HoldfastError):
    """Another process runs the step."""


def do(step: Step, store: Store, machine: Machine, *, wait: bool = True) -> None:
    """Run a step under its lock, unless it is complete; no other function writes `step.json`.

    Args:
        wait: wait for another process that runs the step.

    Raises:
        StepFailed: the step stopped before its end; running it again resumes it.
        Busy: another process runs the step, and `wait` is off.
    """
    progress = machine.progress
    if store.record(step.id) is not None:
        progress.end(step.title, True, None)
        return

    def waiting() -> None:
        if not wait:
            raise Busy(f"Another process runs this step: {step.title}")
        progress.say(f"Waiting for another run to finish: {step.title}")

    with _explained(step, store), store.lock(step.id, waiting):
        if store.record(step.id) is not None:
            progress.end(step.title, True, None)
            return
        folder = store.path(step.id)
        damage = store.damage(step.id)
        if damage is not None:
            # No part of it is used, or the changed rows would be part of the new result.
            progress.say(f"{step.title} is done again: {folder} is damaged ({damage}).")
            remove_tree(folder)
        progress.begin(step.title, store.begun(step.id))
        for path, count in store.begin(step.id).items():
            progress.say(f"{count} rows of {path} are made again: they changed since they were written.")
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
    """Take part in a step that the main process runs."""
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
            f"No space left on the disk that holds {store.root}, during: {step.title}. Free some space and "
            "run the same command again to resume."
        )
    return (
        f"{step.title} failed: {type(error).__name__}: {text}\n"
        f"Finished work is kept in {store.path(step.id)}; "
        "run the same command again to resume (--debug shows where it failed)."
    )
