"""Temporary files and folders beside their place, and locks on outputs.

The owner of a temporary holds a lock on it. The system releases the lock when the process ends, also by a
kill, so that the next process can remove a temporary that nobody locks. A file system without locks keeps it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\..+\.holdfast-[a-z0-9_]{8}")
"""The name of every temporary: `.NAME.holdfast-` and eight characters."""


def is_temporary(path: Path) -> bool:
    """Whether a path is a temporary of this module, or is within one."""
    return any(TEMPORARY.fullmatch(part) for part in path.parts)


@contextlib.contextmanager
def temporary(place: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new temporary file or folder beside `place`; it is removed at the end unless it was renamed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        remove_left(place)
    else:
        _remove_left_once(place)
    made, lock = _make(place, folder)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(made, ignore_errors=True) if folder else made.unlink()
        if lock is not None:
            os.close(lock)


def _make(place: Path, folder: bool) -> tuple[Path, int | None]:
    """Return a new temporary and the descriptor that holds its lock, or None if the system has no locks."""
    while True:
        if folder:
            made = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.holdfast-"))
        else:
            handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.holdfast-")
            os.close(handle)
            made = Path(name)
        # Another process may take it for one that was left, before it is locked. Then that process holds the
        # lock, or has removed the file.
        try:
            return made, _lock(made)
        except BlockingIOError:
            continue
        except OSError:
            if made.exists():
                return made, None


def remove_left(place: Path) -> None:
    """Remove the temporaries of `place` that ended processes left."""
    prefix = f".{place.name}.holdfast-"
    with contextlib.suppress(OSError):
        for entry in os.scandir(place.parent):
            if entry.name.startswith(prefix) and TEMPORARY.fullmatch(entry.name):
                _remove(Path(entry.path))


_remove_left_once = cache(remove_left)


def _remove(left: Path) -> None:
    try:
        lock = _lock(left)
    except OSError:
        return  # its owner works on it, or the file system has no locks
    if lock is None:
        return
    with contextlib.suppress(OSError):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a file or folder and return the descriptor that holds the lock; None if the system has no locks.

    Raises:
        BlockingIOError: another process holds the lock. OSError: it cannot be locked, or is gone.
    """
    if fcntl is None:
        return None
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(opened).st_ino != path.stat().st_ino:
            raise FileNotFoundError(path)
    except BaseException:
        os.close(opened)
        raise
    return opened


class Writing:
    """A lock on an output that is written in parts: a context manager that holds `.NAME.lock` beside it.

    Raises:
        BlockingIOError: another process holds it. OSError: the folder cannot be written.
    """

    def __init__(self, out: Path):
        self.path = out.with_name(f".{out.name}.lock")
        self._held: int | None = None
        if fcntl is None:
            return
        while self._held is None:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644))
            # The holder before removes the file when it ends.
            with contextlib.suppress(FileNotFoundError):
                self._held = _lock(self.path)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *error: object) -> None:
        if self._held is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._held)
            self._held = None
