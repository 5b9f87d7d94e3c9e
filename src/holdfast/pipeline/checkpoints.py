"""The checkpoints of a training stage: which one a training resumes from.

A checkpoint is used only if it has a `holdfast.json`, which is written last, so that a kill while saving
costs only one interval. It lists the checkpoint's files with sizes and SHA-256; a checkpoint whose files
differ is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holdfast.machine import digests
from holdfast.machine.files import read_json, remove_tree, write_json
from holdfast.machine.store import MARKER


def mark(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Mark a checkpoint as complete, with `facts` about the training up to it."""
    files = digests.describe(_files(checkpoint), checkpoint)
    write_json(checkpoint / MARKER, digests.sealed({**facts, "files": files}))


def last_checkpoint(folder: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """Return the newest checkpoint that is complete and unchanged.

    Newer ones with other files are removed, and so are half-written ones, which have no marker.

    Args:
        say: called with a message about each checkpoint that is removed.
    """
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and (path / MARKER).is_file():
            found[int(number)] = path
        else:
            remove_tree(path)
    for _, checkpoint in sorted(found.items(), reverse=True):
        changed = _changed(checkpoint)
        if changed is None:
            return checkpoint
        if say is not None:
            say(f"{checkpoint} is damaged ({changed}). It is removed; training resumes from an earlier one.")
        remove_tree(checkpoint)
    return None


def _changed(checkpoint: Path) -> str | None:
    """Return what differs between a checkpoint's files and its marker; None if nothing does."""
    try:
        marked = read_json(checkpoint / MARKER)
        if not digests.intact(marked):
            return f"{MARKER} was changed, or was written by an earlier version"
        listed = marked["files"]
        added = [p for p in _files(checkpoint) if p.relative_to(checkpoint).as_posix() not in listed]
        names = digests.changed(listed, checkpoint)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    # Systems add hidden files of their own; `.metadata` is torch's.
    names += [p.name for p in added if p.name == ".metadata" or not p.name.startswith(".")]
    return f"changed, missing or added: {', '.join(names)}" if names else None


def _files(checkpoint: Path) -> list[Path]:
    return [p for p in checkpoint.rglob("*") if p.is_file() and p != checkpoint / MARKER]
