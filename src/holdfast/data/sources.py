"""What a data set may be named by: a built-in name, a file, a folder or a Hub id; read to records.

No rows are interpreted here; `rows.to_rows` does that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from holdfast.data.files import ACCEPTED, file_kind, parse, read_bytes, sha256_of
from holdfast.data.hub import HubId, hub_records, hub_revision
from holdfast.errors import DataError
from holdfast.tasks import SafetyData, Task, find

Source = str | Path | Task | SafetyData
# "train.jsonl", "train-00000-of-00002.parquet" and "30k_train.jsonl.gz" all name their split first.
_SPLIT = re.compile(r"^(?P<split>.+?)(-\d+-of-\d+)?(\.\w+)+$")
_ALIASES = {"validation": "test", "valid": "test", "val": "test", "dev": "test"}
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
    """Records as they were found, with where each stands ("line 3") and where all come from."""

    records: list[dict[str, Any]]
    name: str
    sha256: str
    path: str
    places: list[str] = field(repr=False)
    licence: str | None = None
    warning: str | None = None

    def place(self, i: int) -> str:
        """The file and line of record `i` (from 0), for a message."""
        return f"{self.path}, {self.places[i]}"


@dataclass(frozen=True)
class Located:
    """A source found: the local files of one split, or a Hub id. `alone`: one file, without splits."""

    name: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None
    hub: HubId | None = None
    split: str = "train"
    alone: bool = False
    licence: str | None = None
    warning: str | None = None


def read_records(source: Source, *, role: str = "user", split: str | None = None) -> Loaded:
    """Every record of `source`.

    Args:
        source: "world", the name of a task or safety data set, a file, a folder saved by
            `datasets.save_to_disk` or holding a data file for each split, or a Hub id
            `owner/name[:config][@revision]`. A name that is also a file: write `./name`.
        role: "user", "task", "alignment", "harmful" or "benign"; matters for "world", which has
            several files.
        split: "train" (the default) or "test"; a single file has only itself.

    Raises:
        DataError: nothing is there, or it cannot be read in full.
    """
    found = _locate(source, role, split or "train")
    if found.hub is not None:
        records = hub_records(found.hub, found.split)
        places = [f"row {i}" for i in range(1, len(records) + 1)]
        text = json.dumps(records, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        path = f"{found.name} ({found.split})"
        return Loaded(records, found.name, digest, path, places, found.licence, found.warning)
    if found.saved is not None:
        records = _saved_records(found.saved)
        places = [f"row {i}" for i in range(1, len(records) + 1)]
        return Loaded(records, found.name, _digest(found.files), str(found.saved), places)
    records, places = [], []
    hashes = []
    for file in found.files:
        data = read_bytes(file)
        hashes.append((file, hashlib.sha256(data).hexdigest()))
        new_records, new_places = parse(file, data)
        records += new_records
        places += [f"{file.name}, {place}" if len(found.files) > 1 else place for place in new_places]
    shown = str(found.files[0] if len(found.files) == 1 else found.files[0].parent)
    digest = _digest_of(hashes)
    return Loaded(records, found.name, digest, shown, places, found.licence, found.warning)


def fingerprint(source: Source, *, role: str = "user", split: str | None = None) -> str:
    """What `source` holds, as a short text, without parsing it; the place of the files does not matter.

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
        else:
            kinds = sorted({file_kind(path) or path.suffix for path in found.files})
            parts.append(f"{'+'.join(kinds)}:{_digest(found.files)}")
    return " ".join(parts)


def has_split(source: Source, split: str, *, role: str = "user") -> bool:
    """Whether `source` has rows of its own for `split` (a single file has not)."""
    try:
        found = _locate(source, role, split)
    except _NoSplit:
        return False
    return not (found.alone and split != "train")


class _NoSplit(DataError):
    """A folder or a Hub id without the split that was asked for."""


def _existing(text: str) -> Path | None:
    """The file or folder that `text` names, or None."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long for a path, or no home folder
        return None


def _locate(source: Source, role: str, split: str) -> Located:
    known = find(source) if isinstance(source, str) else source
    if isinstance(known, Task | SafetyData):
        return _world(role, split) if known.name == "world" else _known(known, split)
    text = str(source)
    if not text.strip():
        raise DataError("A data set has an empty name. Expected a file, a folder, a Hub id or a known name.")
    path = _existing(text)
    if path is not None:
        if path.is_dir():
            return _folder(path, split)
        return Located(path.name, files=(path,), split=split, alone=True)
    hub = HubId.read(text)
    if isinstance(source, Path) or hub is None or file_kind(Path(text)) is not None:
        raise _missing(Path(text).expanduser())
    return Located(str(hub), hub=hub, split=split)


def _world(role: str, split: str) -> Located:
    from holdfast import world

    if role not in _WORLD:
        raise DataError(f"The world has no data for the role '{role}'. It has: {', '.join(_WORLD)}.")
    path = Path(world.DATA) / _WORLD[role].format(split)
    return Located("world", files=(path,), split=split, licence="Apache-2.0")


def _known(known: Task | SafetyData, split: str) -> Located:
    if known.hub_id is None:
        raise DataError(f"'{known.name}' has no data of its own. Give your files beside it.")
    warning = known.warning if isinstance(known, SafetyData) else None
    hub = HubId(known.hub_id, known.hub_config)
    return Located(known.hub_id, hub=hub, split=known.splits[split], licence=known.licence, warning=warning)


def _missing(path: Path) -> DataError:
    """The error for a path where nothing is, with the nearest name beside it."""
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


def _folder(folder: Path, split: str) -> Located:
    """The files of `split` in a folder of `save_to_disk`, or with a file or a sub-folder for each split."""
    if (folder / "state.json").is_file():
        splits = {"": folder}
    elif (folder / "dataset_dict.json").is_file():
        splits = {p.name: p for p in sorted(folder.iterdir()) if (p / "state.json").is_file()}
    else:
        return _data_files(folder, split)
    chosen = splits[_choose(folder, list(splits), split)]
    files = tuple(sorted(chosen.glob("*.arrow")))
    if not files:
        raise DataError(f"{chosen} is a saved data set without its .arrow files.")
    return Located(folder.name, files=files, saved=chosen, split=split)


def _data_files(folder: Path, split: str) -> Located:
    splits: dict[str, list[Path]] = {}
    for place in (folder, folder / "data", *sorted(p for p in folder.iterdir() if p.is_dir())):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.is_file() and file_kind(path) is not None and not path.name.startswith("."):
                match = _SPLIT.match(path.name)
                inner = place.name if place not in (folder, folder / "data") else ""
                name = inner or (match["split"] if match else path.stem)
                if path not in splits.setdefault(name, []):
                    splits[name].append(path)
    if not splits:
        raise DataError(f"{folder} is a folder without data. Expected {ACCEPTED}, one for each split.")
    files = tuple(splits[_choose(folder, list(splits), split)])
    return Located(folder.name, files=files, split=split)


def _choose(folder: Path, names: list[str], split: str) -> str:
    """The one name that means `split`: itself, an alias ("validation"), or "..._train" as in "30k_train"."""
    for fits in (
        lambda name: name == split,
        lambda name: _ALIASES.get(name) == split,
        lambda name: re.split(r"[_-]", name)[-1] == split,
        lambda name: len(names) == 1 and split == "train",
    ):
        chosen = [name for name in names if fits(name)]
        if len(chosen) == 1:
            return chosen[0]
    found = ", ".join(name or "one without a name" for name in sorted(names))
    raise _NoSplit(f"{folder} has no single split '{split}'; found: {found}. Name the file itself instead.")


def _saved_records(folder: Path) -> list[dict[str, Any]]:
    import datasets

    try:
        records = datasets.load_from_disk(str(folder)).to_list()
    except Exception as error:  # pyarrow, json and OS errors: the folder is torn
        raise DataError(f"{folder} is not a whole saved data set: {str(error).splitlines()[:1]}") from error
    if not records:
        raise DataError(f"{folder} holds no rows.")
    return records


def _digest(files: Iterable[Path]) -> str:
    return _digest_of((path, sha256_of(path)) for path in files)


def _digest_of(hashes: Iterable[tuple[Path, str]]) -> str:
    """One file: the sha256 of its bytes. Several: that of their names and sha256, in the order of names."""
    pairs = sorted((path.name, digest) for path, digest in hashes)
    if len(pairs) == 1:
        return pairs[0][1]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
