"""A step of a run: what names it, and doing it once, under its lock, on the main process or on all."""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, StepFailed
from holdfast.machine.store import Store, identity_hash, provenance
from holdfast.pipeline.context import Context, State
from holdfast.recipe import Recipe

FORMAT = {
    "data": 1, "manifest": 1, "train": 2, "post_hoc": 1, "generate": 2, "moderate": 1, "rate": 1, "score": 3,
}  # fmt: skip
"""Raise one where the content of that kind of step changes for the same identity."""


@dataclass(frozen=True)
class Step:
    """A step: `work(folder, context)` fills its folder and returns facts for `step.json`.

    `together`: all processes of a run do it at the same time; the main one does any other step alone.
    """

    kind: str
    title: str
    detail: str
    identity: Mapping[str, Any]
    work: Callable[[Path, Context], Mapping[str, Any] | None]
    together: bool = False

    @property
    def id(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{identity_hash({'kind': self.kind, **self.identity})}"


@dataclass(frozen=True)
class Plan:
    """The steps of a run in order, and the states of the model that it evaluates."""

    recipe: Recipe
    steps: tuple[Step, ...]
    states: tuple[State, ...]
    manifest: str
    model: Path

    def __iter__(self) -> Any:
        return iter(self.steps)


def do(step: Step, context: Context) -> None:
    """One step under its lock, unless it is complete; nothing else writes `step.json`.

    Raises:
        StepFailed: it stopped half-way; doing it again goes on from there.
    """
    store, progress = context.store, context.progress
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
            context.processes.tell({"do": step.id})
        facts = dict(step.work(folder, context) or {})
        seconds = facts.pop("seconds", time.monotonic() - began)
        store.complete(
            step.id,
            {"kind": step.kind, "title": step.title, "identity": step.identity, "seconds": seconds,
             **facts, "provenance": record},
        )  # fmt: skip
        progress.end(step.title, False, seconds)


def join(step: Step, context: Context) -> None:
    """Take part in a step that the main process does."""
    with _explained(step, context.store):
        step.work(context.store.path(step.id), context)


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
