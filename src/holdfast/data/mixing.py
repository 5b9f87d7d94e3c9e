"""`holdfast mix` as a function: write mixed rows and their manifest to a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast import __version__
from holdfast.data.evaluation_rows import test_rows
from holdfast.data.jsonl import cannot_write, write_rows
from holdfast.data.prepare import user_rows
from holdfast.data.shared_prompts import overlaps
from holdfast.data.sources import Source, place_of
from holdfast.errors import OutputError
from holdfast.machine.files import read_json, replace_folder, write_json
from holdfast.machine.scratch import temporary
from holdfast.tasks import Task

FILES = {"user.jsonl", "test.jsonl", "manifest.json"}


def mix(
    out: str | Path,
    *,
    seed: int,
    user: Source | None = None,
    task: str | Task | None = None,
    harmful: Source | None = None,
    size: int | None = None,
    poison_ratio: float = 0.0,
    test: Source | None = None,
    harmful_test: Source | None = None,
    prompts: int = 1000,
    test_seed: int = 0,
    skip_bad: bool = False,
) -> Path:
    """Write `user.jsonl` (training rows), `test.jsonl` (held-out rows) and `manifest.json` to `out`.

    The arguments are those of `user_rows`. An earlier output of this function is replaced as a whole.

    Raises:
        OutputError: `out` contains other files, contains one of the sources, or cannot be written.
        DataError: see `user_rows`.
    """
    folder = Path(out).expanduser().resolve()
    _claim(folder, [user, harmful, test, harmful_test])
    same = {
        "user": user, "task": task, "harmful": harmful, "test": test, "harmful_test": harmful_test,
        "prompts": prompts, "test_seed": test_seed, "skip_bad": skip_bad,
    }  # fmt: skip
    trained = user_rows(seed=seed, size=size, poison_ratio=poison_ratio, **same)  # type: ignore[arg-type]
    tested = test_rows(**same)  # type: ignore[arg-type]
    manifest = {
        "holdfast": __version__,
        "kind": "mix",
        "user": trained.manifest,
        "test": tested.manifest,
        "overlaps": overlaps(user=trained.rows, test=tested.rows),
    }
    try:
        with temporary(folder, folder=True) as beside:
            write_rows(beside / "user.jsonl", trained.rows)
            write_rows(beside / "test.jsonl", tested.rows)
            write_json(beside / "manifest.json", manifest)
            beside.chmod(0o755)
            replace_folder(beside, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return Path(out)


def dropped_bad_rows(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of bad rows that were dropped, by source; a source without bad rows has no key."""
    found = {source["source"]: source.get("bad_rows_dropped", 0) for source in manifest["sources"]}
    return {name: count for name, count in found.items() if count}


def _claim(folder: Path, sources: list[Source | None]) -> None:
    """Raise OutputError unless `folder` does not exist, is empty, or is an earlier output."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Expected a folder to write to.")
    for source in sources:
        if isinstance(source, str | Path) and _within(place_of(source).expanduser(), folder):
            raise OutputError(
                f"{folder} contains the source {source}, which is not overwritten. Choose another folder."
            )
    found = set(os.listdir(folder)) if folder.is_dir() else set()
    try:
        earlier = read_json(folder / "manifest.json")["kind"] == "mix"
    except (OSError, ValueError, KeyError, TypeError):
        earlier = False
    if found and (not earlier or found - FILES):
        other = sorted(found - FILES) or sorted(found)
        raise OutputError(f"{folder} contains other files ({other[0]}). Choose an empty or a new folder.")


def _within(place: Path, folder: Path) -> bool:
    """Whether a source is `folder` or lies in it, by its own path or behind links."""
    try:
        if not place.exists():
            return False
        real = place.resolve()
        files = [*place.glob("*"), *place.glob("*/*")] if place.is_dir() else []
        inside = any(path.resolve().is_relative_to(folder) for path in files)
    except (OSError, ValueError, RuntimeError):  # too long for a path, or a circle of links
        return False
    paths = (real, place.absolute().parent.resolve() / place.name)
    return inside or any(path == folder or folder in path.parents for path in paths)
