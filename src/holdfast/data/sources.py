"""Read a data set, given by a built-in name, a file, a folder or a Hub id, into records.

Rows are not interpreted here; `rows.to_rows` does that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.data.bad_rows import BadRows
from holdfast.data.files import Placed, file_kind, sha256_of
from holdfast.data.files import records as file_records
from holdfast.data.folders import NoSplit, files_of_split, saved_records
from holdfast.data.hub import HubId, hub_files, hub_records, hub_revision
from holdfast.errors import DataError
from holdfast.tasks import SafetyData, Task, find, names

Source = str | Path | Task | SafetyData
_WORLD = {
    "user": "task_{}.jsonl",
    "task": "task_{}.jsonl",
    "test": "task_{}.jsonl",
    "harmful": "{}.jsonl",
    "alignment": "{}.jsonl",
    "benign": "benign_test.jsonl",
}


@dataclass(frozen=True)
class Loaded:
    """The records of a source, read anew each time they are iterated over, with their places ("line 3").

    `known` is the data set whose name or format was given.
    """

    name: str
    sha256: str
    path: str
    read: Callable[[], Iterator[Placed]] = field(repr=False)
    known: Task | SafetyData | None = None

    def __iter__(self) -> Iterator[Placed]:
        return self.read()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of the first record."""
        first = next((placed for placed in self if not placed.wrong), None)
        return () if first is None else tuple(first.record)

    @cached_property
    def _all(self) -> list[Placed]:
        bad, found = BadRows(self.path), []
        for placed in self:
            if placed.wrong:
                bad.add(placed.place, placed.wrong, placed.hint)
            else:
                found.append(placed)
        bad.refuse(len(found) + bad.count)
        return found

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records in memory. Raises DataError with the place of every record that cannot be read."""
        return [placed.record for placed in self._all]

    @property
    def licence(self) -> str | None:
        """The licence of the known data set."""
        return self.known.licence if self.known else None

    @property
    def warning(self) -> str | None:
        """The warning about the content of the known data set."""
        return self.known.warning if self.known else None

    def place(self, i: int) -> str:
        """The file and line of record `i` (counted from 0), for a message."""
        return f"{self.path}, {self._all[i].place}"


@dataclass(frozen=True)
class Located:
    """A located source: the local files of one split, or a Hub id. `alone`: a single file without splits.

    `records` are those that a data set generates itself; `known` is the data set that was named.
    """

    name: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None
    hub: HubId | None = None
    records: list[dict[str, Any]] | None = None
    split: str = "train"
    alone: bool = False
    known: Task | SafetyData | None = None


def read_records(source: Source, *, role: str = "user", split: str | None = None) -> Loaded:
    """Find `source`, and return its records, which are read when they are iterated over.

    Args:
        source: "world", the name of a task or safety data set, a file, a folder saved by
            `datasets.save_to_disk` or with a data file for each split, or a Hub id
            `owner/name[:config][@revision]`. `name:FILE` reads a file or a folder in the format of the data
            set `name`. For a file that has a data set's name, write `./name`.
        role: "user", "task", "alignment", "harmful" or "benign"; used only for "world", which has
            several files.
        split: "train" (the default) or "test"; a single file has no splits.

    Raises:
        DataError: the source does not exist or cannot be read completely; some of these errors come while
            the records are read.
    """
    found = _locate(source, role, split or "train")
    known = found.known
    records = found.records or []
    try:
        if found.hub is not None and known is not None and known.hub_files:
            found = replace(found, files=tuple(hub_files(found.hub, known.hub_files)), hub=None)
        if found.hub is not None:
            records = hub_records(found.hub, found.split)
    except DataError as error:
        how = f" To get {known.name}: {known.obtain}." if known and known.obtain else ""
        raise DataError(f"{error}{how}") from error
    if found.hub is not None or found.records is not None:
        path = f"{found.name} ({found.split})" if found.hub else found.name
        return Loaded(found.name, _digest_records(records), path, lambda: _numbered(records), known)
    if found.saved is not None:
        folder = found.saved
        return Loaded(
            found.name, _digest(found.files), str(folder), lambda: _numbered(saved_records(folder)), known
        )
    shown = str(found.files[0] if len(found.files) == 1 else found.files[0].parent)
    return Loaded(found.name, _digest(found.files), shown, lambda: _of_files(found), known)


def _of_files(found: Located) -> Iterator[Placed]:
    """The records of all files; with several files, the place of each includes its file."""
    known = found.known
    for file in found.files:
        for placed in file_records(file, known.header if known else ()):
            if known and (known.header or known.files):  # their file names say what the files contain
                placed = placed._replace(record={"file": file.name, **placed.record})
            if len(found.files) > 1:
                placed = placed._replace(place=f"{file.name}, {placed.place}")
            yield placed


def _numbered(records: Iterable[dict[str, Any]]) -> Iterator[Placed]:
    return (Placed(f"row {i}", record) for i, record in enumerate(records, 1))


def named(source: Source | None) -> Task | SafetyData | None:
    """The data set that `source` names, alone or as the format of a file (`name:FILE`); None if none."""
    if isinstance(source, str):
        return find(source.partition(":")[0])
    return None if isinstance(source, Path) else source


def place_of(source: str | Path) -> Path:
    """The path in `source`, without the format of `name:FILE`."""
    name, colon, rest = str(source).partition(":")
    return Path(rest if colon and isinstance(source, str) and find(name) else source)


def fingerprint(source: Source, *, role: str = "user", split: str | None = None) -> str:
    """A short text that identifies the content of `source`, without parsing it or depending on its path.

    For a Hub id it is the id and the revision. `split=None` covers every split.
    """
    if split is None:
        splits = [name for name in ("train", "test") if has_split(source, name, role=role)] or ["train"]
    else:
        splits = [split]
    parts = []
    for name in splits:
        found = _locate(source, role, name)
        if found.hub is not None:
            parts.append(f"hub:{found.hub}@{hub_revision(found.hub)}:{found.split}")
        elif found.records is not None:
            parts.append(f"made:{_digest_records(found.records)}")
        else:
            if found.known and found.known.name != "world":
                parts.append(found.known.stamp)
            kinds = sorted({file_kind(path) or path.suffix for path in found.files})
            parts.append(f"{'+'.join(kinds)}:{_digest(found.files)}")
    return " ".join(parts)


def has_split(source: Source, split: str, *, role: str = "user") -> bool:
    """Whether `source` has separate rows for `split`; a single file or a single split has none for a test."""
    try:
        found = _locate(source, role, split)
    except NoSplit:
        return False
    if split == "train":
        return True
    with contextlib.suppress(NoSplit):
        if found.files and _locate(source, role, "train").files == found.files:
            return False  # the only split of a folder, which is also read to train on
    return not found.alone


def _existing(text: str) -> Path | None:
    """The file or folder that `text` names, or None."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long for a path, or no home folder
        return None


def _locate(source: Source, role: str, split: str) -> Located:
    known = find(source) if isinstance(source, str) else None if isinstance(source, Path) else source
    if known is not None:
        return _world(role, split) if known.name == "world" else _known(known, split)
    text = str(source)
    if not text.strip():
        raise DataError("A data set has an empty name. Expected a file, a folder, a Hub id or a known name.")
    path = _existing(text)
    name, colon, rest = text.partition(":")
    if path is None and colon and isinstance(source, str) and (known := find(name)):
        path = _existing(rest) if rest.strip() else None
        if path is None:
            raise _missing(Path(rest).expanduser())
    if path is not None:
        if path.is_dir():
            return _folder(path, split, known)
        known = known or _published(path)
        return Located(path.name, files=(path,), split=split, alone=True, known=known)
    hub = HubId.read(text)
    if isinstance(source, Path) or hub is None or file_kind(Path(text)) is not None:
        raise _missing(Path(text).expanduser())
    known = next((data for data in map(find, names()) if data and data.hub_id == hub.repo), None)
    if known is None:
        return Located(str(hub), hub=hub, split=split)
    # A known data set given by its Hub id also has its splits, licence and warning.
    return replace(
        _known(known, split), name=str(hub), hub=replace(hub, config=hub.config or known.hub_config)
    )


def _published(path: Path) -> Task | SafetyData | None:
    """The data set that publishes a file with this name, or None."""
    return next((data for data in map(find, names()) if data and path.name in data.files), None)


def _world(role: str, split: str) -> Located:
    from holdfast import world

    if role not in _WORLD:
        raise DataError(f"The world has no data for the role '{role}'. It has: {', '.join(_WORLD)}.")
    path = Path(world.DATA) / _WORLD[role].format(split)
    return Located("world", files=(path,), split=split, known=find("world"))


def _known(known: Task | SafetyData, split: str) -> Located:
    if known.make is not None:
        if split != "train":
            raise NoSplit(f"'{known.name}' has no test rows of its own.")
        return Located(known.name, split=split, records=[dict(r) for r in known.make()], known=known)
    if known.hub_id is None:
        how = known.obtain or "give your own files"
        raise DataError(f"'{known.name}' has no data of its own: {how}.")
    if split not in known.splits:
        what = "test rows; use it as data.test, data.test_harmful or data.benign"
        only = what if "test" in known.splits else "training rows"
        raise NoSplit(f"'{known.name}' has only {only}.")
    hub = HubId(known.hub_id, known.hub_config)
    return Located(known.hub_id, hub=hub, split=known.splits[split], known=known)


def _digest_records(records: list[dict[str, Any]]) -> str:
    text = json.dumps(records, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _folder(folder: Path, split: str, known: Task | SafetyData | None) -> Located:
    """The rows of `split` in a folder; files that match the data set's `hub_files` are read together."""
    together = sorted(folder.glob(known.hub_files)) if known and known.hub_files else []
    if together:
        return Located(folder.name, files=tuple(together), split=split, alone=True, known=known)
    wanted = known.splits.get(split, split) if known else split
    files, saved = files_of_split(folder, split, wanted)
    return Located(folder.name, files=files, saved=saved, split=split, known=known)


def _missing(path: Path) -> DataError:
    """The error for a path that does not exist, with the most similar name in its folder."""
    message = f"{path} does not exist"
    try:
        folder = path.parent
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    except OSError:
        names = []
    if names is None:
        return DataError(f"{message}: there is no folder {path.parent} either.")
    close = get_close_matches(path.name, names, n=1, cutoff=0.6)
    if close:
        return DataError(f"{message}. Did you mean '{path.parent / close[0]}'?")
    return DataError(f"{message}. Expected a file, a folder, a Hub id (owner/name), or a built-in name.")


def _digest(files: Iterable[Path]) -> str:
    return _digest_of((path, sha256_of(path)) for path in files)


def _digest_of(hashes: Iterable[tuple[Path, str]]) -> str:
    """One file: the sha256 of its bytes. Several: the sha256 of their names and hashes, sorted by name."""
    pairs = sorted((path.name, digest) for path, digest in hashes)
    if len(pairs) == 1:
        return pairs[0][1]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
