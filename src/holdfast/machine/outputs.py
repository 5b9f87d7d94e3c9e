"""Single files for results, such as scores: they never replace a file that the same call reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.errors import OutputError


def check_results(files: Iterable[str | Path | None], sources: Iterable[str | Path | None] = ()) -> None:
    """Check before any work that results can be written to files; nothing is written.

    Args:
        files: the files of the results; None for one that is not asked for.
        sources: the files that the call reads.

    Raises:
        OutputError: a file is a folder, is read by the same call, is given twice, or cannot be written.
    """
    read = [Path(source) for source in sources if source is not None]
    known: list[Path] = []
    for path in [Path(file) for file in files if file is not None]:
        if path.is_dir():
            raise OutputError(f"Expected a file to write, found a folder: {path}.")
        if any(_same(path, source) for source in read):
            raise OutputError(f"{path} is read here and is never overwritten. Choose another file.")
        if any(_same(path, other) for other in known):
            raise OutputError(f"{path} is given for two results. Choose a file for each.")
        with written(path):
            _check_folder(path.parent)
        known.append(path)


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Turn an error of the file system into one about the file of a result.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from None


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.absolute() == other.absolute()


def _check_folder(folder: Path) -> None:
    """Raise OSError if a file could not be made in a folder, which need not exist yet."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(20, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(13, f"{there} is read-only")
