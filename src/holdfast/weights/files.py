"""Read files of a folder from an untrusted source: no links out of it, no assumption about sizes.

A file may be a link within its folder, or a link into the `blobs` of the Hub cache that the folder belongs
to. A link to any other place is refused, so that a downloaded folder cannot point to other files of the
machine.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError

JSON_LIMIT = 200_000_000
"""The largest index or configuration that is read, in bytes."""


def safe_path(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`, after checking that it stays inside the folder.

    Raises:
        ModelError: the file is missing, is a broken link, is not a plain file name, or links out of the
            folder.
    """
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise ModelError(f"Expected a plain file name in {folder}, found {name[:200]!r}. Fetch it again.")
    path, home = folder / name, Path(os.path.realpath(folder))
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        what = "is a broken link" if path.is_symlink() else "is missing"
        raise ModelError(f"{path} {what}. Fetch or save the model again.") from None
    allowed = [home]
    if home.parent.name == "snapshots":  # <cache>/models--a--b/snapshots/<revision>, files in .../blobs
        allowed.append(home.parent.parent / "blobs")
    if not target.is_file() and not target.is_dir():
        raise ModelError(f"{path} is not a regular file. Fetch or save it again.")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{path} is a link to {target}, outside its folder; links out of a model folder are not "
            "followed. Copy the file into the folder, or give the folder that holds it."
        )
    return path


def check_regular(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Check that the files in a folder that end in one of `suffixes` can be read without waiting.

    Raises:
        ModelError: one of them is a pipe, a socket or a device, or the folder cannot be read.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(f"Cannot read {folder}: {error.strerror or error}.") from None
    for path in found:
        if path.suffix not in suffixes or path.is_file() or path.is_dir() or not path.exists():
            continue
        raise ModelError(
            f"{path} is not a regular file but a pipe, a socket or a device. Remove it from the folder."
        )


def read_config(path: Path) -> Any:
    """Return the value in a JSON file of a model folder.

    Raises:
        ModelError: the file cannot be read, is too big, or is not JSON.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a regular file. Fetch or save it again.")
        if path.stat().st_size > JSON_LIMIT:
            raise ModelError(f"{path} is larger than {JSON_LIMIT:,} bytes. Fetch or save it again.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({str(error)[:80]}). Fetch or save it again.") from None
