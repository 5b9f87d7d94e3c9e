"""Claim: no damaged store, kill or hostile input changes a number in silence or ends in a foreign exception.

    python benchmarks/faults.py [--kills N] [--examples N] [--share S] [--rounds N] [--runs N] [--fresh]

Five parts, which `results/faults.json` counts together with those of earlier calls:

- kills: every command is stopped by SIGKILL, SIGTERM and SIGINT at random times, N times each, and started
  again. Its output must be that of a command that was never stopped, with no temporary beside it;
- damage: every file of a finished run and of killed ones is torn, emptied, changed at the same size, removed,
  replaced by a folder or a pipe, or made unreadable. The next start ends with the same numbers, or is refused
  with one sentence;
- processes: two and four processes with one output end with the same output, or one sentence. Two and four
  runs with one store all end with the same numbers;
- pages: seconds and bytes of a report on one run and on 50 runs;
- input: mutated recipes, rows, adapters, headers, replies, answers and records, read by the code that reads
  them in a run. Only Holdfast's own errors may come out, each example within 10 seconds of processor time.

The models are those of the tests. Each call uses another seed, and saves after each part. The part `input`
continues with the seeds after those of earlier calls, and saves after each kind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import _fault_inputs as inputs  # noqa: E402
import _fault_stores as stores  # noqa: E402
from _record import RESULTS, save  # noqa: E402

FINE = ("as before", "ended before", "refused")


def tally(found: Iterable[dict[str, Any]], by: str) -> dict[str, Any]:
    """Count outcomes by `by`, and keep those that are faults."""
    counts: dict[str, Counter[str]] = {}
    faults = []
    for one in found:
        fine = one["outcome"] in FINE
        counts.setdefault(str(one[by]), Counter())[one["outcome"] if fine else "fault"] += 1
        if not fine:
            faults.append(one)
            print(one, flush=True)
    return {"counts": {key: dict(value) for key, value in counts.items()}, "faults": faults}


def added(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two tallies as one."""
    counts = {key: Counter(value) for key, value in earlier.get("counts", {}).items()}
    for key, value in new["counts"].items():
        counts[key] = counts.get(key, Counter()) + Counter(value)
    faults = [*earlier.get("faults", []), *new["faults"]]
    return {"counts": {key: dict(value) for key, value in counts.items()}, "faults": faults}


def added_input(earlier: dict[str, Any], name: str, new: dict[str, Any]) -> dict[str, Any]:
    """The counts of `input` with those of one more call for `name`."""
    old = earlier.get(name, {})
    both = {key: old.get(key, 0) + new[key] for key in ("read", "refused", "seconds", "next_seed")}
    peak = max(old.get("peak_memory_bytes", 0), new["peak_memory_bytes"])
    return {**earlier, name: {**both, "fault": old.get("fault") or new["fault"], "peak_memory_bytes": peak}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="rounds of three signals for each command")
    parser.add_argument("--share", type=float, default=1.0, help="share of the damages that is tried")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of two and four processes")
    parser.add_argument("--runs", type=int, default=50, help="runs on one report page")
    parser.add_argument("--examples", type=int, default=100_000, help="examples for each kind of input")
    parser.add_argument("--fresh", action="store_true", help="forget the counts of earlier calls")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    path = RESULTS / "faults.json"
    done = json.loads(path.read_text()) if path.exists() and not given.fresh else {}
    done = {
        key: done[key] for key in ("calls", "kills", "damage", "processes", "input", "pages") if key in done
    }
    seed = done["calls"] = done.get("calls", 0) + 1
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if given.examples:
            for name, subject in inputs.subjects(place).items():
                start = done.get("input", {}).get(name, {}).get("next_seed", 0)
                found = inputs.fuzz(subject, given.examples, start)
                found["next_seed"] = given.examples
                done["input"] = added_input(done.get("input", {}), name, found)
                print(
                    name, f"{given.examples / max(found['seconds'], 0.1):.0f} per second", found, flush=True
                )
                save("faults", done)
        if given.share:
            made = stores.prepare(place)
            done["damage"] = added(
                done.get("damage", {}), tally(stores.damages(place, made, given.share, seed), "damage")
            )
            save("faults", done)
        if given.rounds:
            both = (stores.together(place, given.rounds), stores.sharing(place, given.rounds))
            found = tally(chain.from_iterable(both), "command")
            done["processes"] = added(done.get("processes", {}), found)
            save("faults", done)
        if given.runs:
            done["pages"] = {str(count): stores.page(place, count) for count in (1, given.runs)}
            save("faults", done)
        if given.kills:
            found = tally(stores.killed(place, given.kills, seed), "command")
            done["kills"] = added(done.get("kills", {}), found)
            save("faults", done)


if __name__ == "__main__":
    main()
