"""Rows of a benchmark that are measured one by one and merged into its results file after each row.

`python benchmarks/_rows.py FILE...` merges results from another machine: FILE has the name of a results file.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS

from holdfast.errors import first_line
from holdfast.machine.files import read_json, write_json
from holdfast.machine.store import provenance


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the rows on a GPU."""
    add = parser.add_argument
    add("--gpu", action="store_true", help="measure the rows that need a GPU, one by one")
    add("--results", type=Path, default=RESULTS, help="with --gpu: folder of the results")
    add("--time-limit", type=float, help="with --gpu: start no row after these seconds")
    add("--again", action="store_true", help="with --gpu: also rows that are measured already")
    add("--trial", action="store_true", help="with --gpu: tiny shapes, on the CPU if need be")


class Rows:
    """The rows of one results file."""

    def __init__(self, name: str, given: argparse.Namespace):
        self.place: Path = given.results / f"{name}.json"
        self.again, self.limit, self.began = given.again, given.time_limit, time.monotonic()
        self.measured_on: dict[str, Any] = {
            **{k: v for k, v in provenance().items() if k in ("versions", "hardware")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }

    def __call__(self, path: tuple[str, ...], work: Callable[[], Any]) -> None:
        """Measure a row unless the file holds it, and write it to `path` of the file. Errors are recorded."""
        known: Any = read_json(self.place) if self.place.is_file() else {}
        for key in path:
            known = known.get(key) if isinstance(known, dict) else None
        measured = isinstance(known, dict) and not {"error", "not measured"} & set(known)
        if measured and not self.again:
            return
        spent = time.monotonic() - self.began
        if self.limit is not None and spent > self.limit:
            print(f"{' | '.join(path)}: not started, the time limit is over", flush=True)
            return
        began = time.monotonic()
        try:
            found = work()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {first_line(error)}"}
        _free()
        seconds = time.monotonic() - began
        value: Any = {**found, "row_seconds": round(seconds, 1), **self.measured_on}
        for key in reversed(path):
            value = {key: value}
        old = read_json(self.place) if self.place.is_file() else {}
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.place, merged(old, value))
        told = {k: v for k, v in found.items() if not isinstance(v, list | dict)}
        print(f"{' | '.join(path)} ({seconds:.0f} s): {told}", flush=True)


def merged(old: Any, new: Any) -> Any:
    """`old` with the keys of `new`, block by block. A measured row replaces a text or an error as a whole."""
    if not isinstance(old, dict) or not isinstance(new, dict) or {"error", "not measured"} & set(old):
        return new
    if "error" in new and old:
        return old  # an earlier measurement is worth more than an error
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    for part in map(Path, sys.argv[1:]):
        target = RESULTS / part.name
        write_json(target, merged(read_json(target) if target.is_file() else {}, read_json(part)))
        print(f"{part} is merged into {target}")
