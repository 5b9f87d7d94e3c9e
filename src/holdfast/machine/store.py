"""Step directories: identities, locks, completion markers and provenance.

A step's folder is `<store>/<kind>-<12 hex digits>`, where the digits are the hash of the step's identity.
Work in progress (checkpoints, growing JSONL files) is kept in the same folder, so that a killed run can
resume; `step.json` is written last and is the only sign of completion.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from holdfast.errors import OutputError
from holdfast.machine.digests import Digests, changed, describe, intact, sealed
from holdfast.machine.files import SUMS, drop_changed, read_json, remove_tree, remove_unless, write_json
from holdfast.machine.scratch import TEMPORARY, is_temporary

MARKER = "holdfast.json"
"""The file that marks a folder as made by Holdfast; nothing is written into a folder of anyone else."""

SCRATCH = "checkpoints"
"""The folder within a step that is removed when the step is complete."""

DIGESTS = "digests.json"
"""The file in a store with the digests of large files."""

LOCKS = ".locks"
"""The folder in a store with a lock file for each step."""

STEP = re.compile(r"[a-z_]+-[0-9a-f]{12}")
"""The name of a step's folder."""


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def identity_hash(value: Any) -> str:
    """Return twelve hex digits of the hash of `value`, whose texts may hold half surrogates."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def now() -> str:
    """Return the time in UTC as ISO 8601, with a resolution of one second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def claim_folder(folder: Path, kind: str) -> None:
    """Mark `folder` as a `kind` folder of Holdfast. It must be absent, empty, or marked as one already.

    A marker that is lost or damaged is written again if the folder's other files show that it is ours.

    Raises:
        OutputError: it is a file, contains something else, or cannot be written.
    """
    marker = folder / MARKER
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"Expected a folder to write to, found a file: {folder}. Give another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        # Other processes may be claiming it, too: their temporaries are nobody else's files.
        found = [path.name for path in folder.iterdir() if not path.name.startswith(f".{MARKER}.")]
        if MARKER in found:
            marked = _marked(marker)
            if marked == kind:
                return
            if marked is not None:
                raise OutputError(f"{folder} holds a Holdfast {marked}, not a {kind}. Give another --out.")
            if not _looks_like(folder, kind):
                raise OutputError(f"{marker} is damaged. Give another --out.")
        elif found and not _looks_like(folder, kind):
            raise OutputError(
                f"{folder} is not empty and was not made by Holdfast; nothing was written. "
                "Give an empty or new folder with --out."
            )
        made = {"holdfast": importlib.metadata.version("holdfast"), "kind": kind}
        made["started"] = min([now(), *_starts(folder)])
        remove_unless(marker, Path.is_file)
        write_json(marker, made)
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}: {error.strerror or error}.") from None


def _marked(marker: Path) -> str | None:
    """Return the kind in a marker; None if the marker is damaged."""
    try:
        kind = read_json(marker)["kind"] if marker.is_file() else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def _looks_like(folder: Path, kind: str) -> bool:
    """Whether a folder without a readable marker is a store with a step, or a run with such a store."""
    if kind == "run":
        return (folder / "steps").is_dir() and _looks_like(folder / "steps", "store")
    steps = [path for path in folder.iterdir() if STEP.fullmatch(path.name)]
    others = {path.name for path in folder.iterdir()} - {MARKER, DIGESTS, LOCKS}
    others = {name for name in others if not TEMPORARY.fullmatch(name)} - {path.name for path in steps}
    return kind == "store" and not others and any((path / "step.json").is_file() for path in steps)


def _starts(folder: Path) -> list[str]:
    """Return when the steps in a folder were started; a marker that is written again needs the first."""
    found = []
    for path in folder.glob("*/step.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            found.append(str(read_json(path)["provenance"]["started"]))
    return found


class Store:
    """A folder of steps that any number of runs may share.

    Args:
        read_only: use the digests of large files that earlier runs computed, without adding new ones.
    """

    def __init__(self, root: Path, *, read_only: bool = True):
        self.root = root
        self.digests = Digests(root / DIGESTS, read_only=read_only)

    def started(self) -> str:
        """Return the date of the first start of a run in this store, as in "2026-03-01"; today if none."""
        try:
            return str(read_json(self.root / MARKER)["started"])[:10]
        except (OSError, ValueError, LookupError, TypeError):
            return now()[:10]

    def path(self, step_id: str) -> Path:
        """Return the folder of a step, complete or not."""
        return self.root / step_id

    def record(self, step_id: str) -> dict[str, Any] | None:
        """Return what `complete` wrote; None if the step is not complete, or is damaged."""
        return self._read(step_id)[0]

    def damage(self, step_id: str) -> str | None:
        """Return what changed since the step was completed; None if nothing did, or it is not complete."""
        return self._read(step_id)[1]

    def _read(self, step_id: str) -> tuple[dict[str, Any] | None, str | None]:
        folder = self.path(step_id)
        if (folder.exists() and not folder.is_dir()) or (folder.is_symlink() and not folder.exists()):
            return None, "it is no folder"
        if not (folder / "step.json").is_file():
            return None, None
        try:
            record = read_json(folder / "step.json")
            if not intact(record):
                return None, "step.json was changed, or was written by an earlier version"
            names = changed(record["files"], folder, self.digests)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None, "step.json cannot be read"
        return (None, f"changed or missing: {', '.join(names)}") if names else (record, None)

    def begun(self, step_id: str) -> bool:
        """Whether there is unfinished work to resume."""
        return self.path(step_id).is_dir() and self.record(step_id) is None

    def begin(self, step_id: str) -> dict[Path, int]:
        """Make the folder of a step that is not complete, without rows that changed since they were appended.

        Returns:
            The number of removed rows of each file that lost some.
        """
        folder = self.path(step_id)
        remove_unless(folder / SUMS, Path.is_dir)
        (folder / SUMS).mkdir(parents=True, exist_ok=True)
        dropped = {path: drop_changed(path) for path in sorted(folder.glob("*.jsonl"))}
        return {path: count for path, count in dropped.items() if count}

    @contextlib.contextmanager
    def lock(self, step_id: str, waiting: Any = None) -> Iterator[None]:
        """Lock the step against other processes; the system releases the lock if this process is killed.

        `waiting()` is called once if another process holds the lock.
        """
        from filelock import FileLock, Timeout

        locks = self.root / LOCKS
        remove_unless(locks, Path.is_dir)
        locks.mkdir(parents=True, exist_ok=True)
        remove_unless(locks / f"{step_id}.lock", Path.is_file)
        lock = FileLock(locks / f"{step_id}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is not None:
                waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def complete(self, step_id: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write `step.json`, which marks the step as complete and lists its files with sizes and SHA-256.

        The folders for resuming (`SCRATCH`, `SUMS`) are removed only after that: a kill loses no work.
        """
        folder = self.path(step_id)
        files = [
            path
            for path in folder.rglob("*")
            if path.is_file()
            and path.name != "step.json"
            and not {folder / SCRATCH, folder / SUMS} & {*path.parents}
            and not is_temporary(path.relative_to(folder))
        ]
        described = describe(files, folder, self.digests)
        full = sealed({**record, "id": step_id, "files": described, "finished": now()})
        remove_unless(folder / "step.json", Path.is_file)
        write_json(folder / "step.json", full)
        remove_tree(folder / SCRATCH)
        remove_tree(folder / SUMS)
        return full


@cache
def versions() -> dict[str, str]:
    """Return the versions of packages that affect the numbers, from their metadata, without imports."""
    found = {"python": platform.python_version()}
    for name in (
        "holdfast",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "tokenizers",
        "numpy",
        "safetensors",
        "bitsandbytes",
        "lm_eval",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def hardware() -> dict[str, Any]:
    """Return processor, cores and memory in bytes. The accelerator is recorded by the code that uses it."""
    import psutil

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
    }


@cache
def git_commit() -> str | None:
    """Return the commit of Holdfast's own checkout, if it runs from one."""
    folder = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "log", "-1", "--format=%H", "--", str(folder)],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def provenance() -> dict[str, Any]:
    """Return facts that are recorded with every result and are not part of any identity."""
    return {"versions": versions(), "hardware": hardware(), "git_commit": git_commit(), "started": now()}
