"""Data folders: written by `datasets.save_to_disk`, or with a file or a sub-folder for each split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.data.files import ACCEPTED, file_kind
from holdfast.data.tables import BATCH, table_records
from holdfast.errors import DataError

# "train.jsonl", "train-00000-of-00002.parquet" and "30k_train.jsonl.gz" all begin with their split. The Hub
# also adds a hash ("train-00000-of-00001-a09b74b3ef9c3b56.parquet"), Spark too ("part-00000-<hash>.parquet").
_SPLIT = re.compile(
    r"^(?P<split>.+?)([-_.]\d{5,}(-of-\d+)?|[-_.]\d+-of-\d+)?([-_][0-9a-f]{8,}[0-9a-f-]*)?(-c\d+)?(\.\w+)+$"
)
_SHARD = re.compile(r"^(part|data|shard)?[-_]?\d*$")
"""The name of a file that is one of several and names no split: "0000.parquet", "part-00000.parquet"."""
_ALIASES = {"validation": "test", "valid": "test", "val": "test", "dev": "test"}


class NoSplit(DataError):
    """A folder or a data set does not have the requested split."""


def files_of_split(folder: Path, split: str, wanted: str) -> tuple[tuple[Path, ...], Path | None]:
    """Find the files of `split`, and the folder that `datasets` saved them to (or None).

    Args:
        wanted: the data set's own name of the split; it is tried first.

    Raises:
        NoSplit: there is no such split, or more than one.
        DataError: there is no data.
    """
    if (folder / "state.json").is_file():
        splits = {"": folder}
    elif (folder / "dataset_dict.json").is_file():
        splits = {p.name: p for p in sorted(folder.iterdir()) if (p / "state.json").is_file()}
    else:
        return _data_files(folder, split, wanted), None
    chosen = splits[_choose(folder, list(splits), split, wanted)]
    files = tuple(sorted(chosen.glob("*.arrow")))
    if not files:
        raise DataError(f"{chosen} is a saved data set, but its .arrow files are missing.")
    return files, chosen


def _data_files(folder: Path, split: str, wanted: str) -> tuple[Path, ...]:
    splits: dict[str, list[Path]] = {}
    for place in (folder, folder / "data", *sorted(p for p in folder.iterdir() if p.is_dir())):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.is_file() and file_kind(path) is not None and not path.name.startswith("."):
                match = _SPLIT.match(path.name)
                inner = place.name if place not in (folder, folder / "data") else ""
                name = match["split"] if match else path.stem
                name = inner or ("" if _SHARD.match(name) else name)
                if path not in splits.setdefault(name, []):
                    splits[name].append(path)
    if not splits:
        raise DataError(f"{folder} is a folder without data files. Expected {ACCEPTED}, one for each split.")
    return tuple(splits[_choose(folder, list(splits), split, wanted)])


def _choose(folder: Path, names: list[str], split: str, wanted: str) -> str:
    """The only name that means `split`: itself, an alias ("validation"), or "..._train" as in "30k_train"."""
    for fits in (
        lambda name: name == wanted,
        lambda name: name == split,
        lambda name: _ALIASES.get(name) == split,
        lambda name: re.split(r"[_-]", name)[-1] == split,
        lambda name: len(names) == 1 and split == "train",
    ):
        chosen = [name for name in names if fits(name)]
        if len(chosen) == 1:
            return chosen[0]
    found = ", ".join(name or "a split without a name" for name in sorted(names))
    raise NoSplit(f"{folder} has no unique split '{split}'; found: {found}. Give the path of a file instead.")


def saved_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every record of a folder that `datasets` saved. Raises DataError: it is incomplete or empty."""
    import datasets

    found = 0
    try:
        saved = datasets.load_from_disk(str(folder)).with_format("arrow")
        for table in saved.iter(BATCH):
            for record in table_records(str(folder), table):
                found += 1
                yield record
    except DataError:
        raise
    except Exception as error:  # pyarrow, json and OS errors: the folder is incomplete
        raise DataError(
            f"{folder} is not a complete saved data set: {str(error).splitlines()[:1]}"
        ) from error
    if not found:
        raise DataError(f"{folder} has no rows.")
