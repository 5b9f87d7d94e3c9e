"""A copy of a weights folder in which some tensors get other values, made beside and then renamed.

Every file is copied byte for byte, headers, dtypes and shards as they are; then the chosen tensors are
overwritten in place. What is not chosen cannot change.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import ModelError, OutputError
from holdfast.weights.files import safe_path
from holdfast.weights.reader import Tensor, WeightFile

SIDE_FILES = (".json", ".jinja", ".model", ".txt")
"""What is copied beside the weights: configuration and tokenizer."""
NOT_COPIED = ("trainer_state.json", "README.md")


def check_out(out: Path, sources: Mapping[str, Path], record: str) -> None:
    """Make sure that `out` may be written: new, empty, or an earlier result (it holds `record`).

    Raises:
        OutputError: it is, holds, or lies in a source; it is a file, or somebody's own folder.
    """
    place = Path(os.path.realpath(out))
    for role, source in sources.items():
        home = Path(os.path.realpath(source))
        if place == home or place.is_relative_to(home) or home.is_relative_to(place):
            raise OutputError(
                f"The output folder {out} is or overlaps the {role} folder {source}, which must stay as "
                "it is. Give another --out."
            )
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"Expected a folder to write to, found a file: {out}. Give another --out.")
        if out.is_dir() and any(out.iterdir()) and not _is_ours(out / record):
            raise OutputError(
                f"{out} is not empty and was not made by this command; nothing was written. "
                "Give an empty or new folder with --out."
            )
    except OSError as error:
        raise OutputError(f"Cannot write to {out}: {error.strerror or error}.") from None


def _is_ours(record: Path) -> bool:
    try:
        return "holdfast" in json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


class Rewrite:
    """A context manager: the copy appears at `out` when it is left without an error, or not at all.

    Raises:
        OutputError: the disk is full, or the place cannot be written.
    """

    def __init__(self, source: Path, files: Iterable[WeightFile], out: Path, record: str):
        self.source, self.files, self.out, self.record = source, list(files), out, record
        self._lock = threading.Lock()
        self._beside = Path()

    def __enter__(self) -> Rewrite:
        parent = Path(os.path.realpath(self.out)).parent

        def begin() -> None:
            parent.mkdir(parents=True, exist_ok=True)
            self._beside = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=parent))
            self._beside.chmod(0o755)

        self._try(begin)
        try:
            self._try(self._copy)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self._try(self._swap)
        finally:
            self._remove()

    def put(self, tensor: Tensor, values: NDArray[np.uint8]) -> None:
        """Give `tensor`, one of the source's, other bytes in the copy."""
        if values.nbytes != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {tensor.nbytes} bytes, not {values.nbytes}")

        def write() -> None:
            with self._lock, (self._beside / tensor.file.path.name).open("r+b") as file:
                file.seek(tensor.offset)
                file.write(values.data)

        self._try(write)

    def text(self, name: str, text: str) -> None:
        """A file of text in the copy."""
        self._try(lambda: (self._beside / name).write_text(text, encoding="utf-8", newline="\n"))

    def _copy(self) -> None:
        weights = {file.path.name for file in self.files}
        for path in sorted(self.source.iterdir()):
            side = path.suffix in SIDE_FILES and path.name not in (*NOT_COPIED, self.record)
            if path.name in weights or (side and path.is_file()):
                try:
                    found = safe_path(self.source, path.name)
                except ModelError:
                    if path.name in weights:
                        raise
                    continue  # a link to another place of the machine
                shutil.copyfile(found, self._beside / path.name)

    def _swap(self) -> None:
        """Put the copy in the place of what is at `out`."""
        place = Path(os.path.realpath(self.out))
        if place.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=place.parent))
            place.rename(old / "old")
            self._beside.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self._beside.rename(place)

    def _remove(self) -> None:
        if self._beside != Path():
            shutil.rmtree(self._beside, ignore_errors=True)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            raise OutputError(f"Cannot write {self.out}: {error.strerror or error}.") from None
