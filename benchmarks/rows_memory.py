"""Claim: `filter` and `mix` read and write a million rows in bounded memory.

A made-up file of ROWS rows is filtered with a judge that loads nothing, and mixed with harmful rows. Each
command runs in a process of its own; its peak memory (maximum resident set) and its seconds are recorded. The
memory for 1,000,000 rows may exceed that for 10,000 rows by 200 MiB.

    python benchmarks/rows_memory.py [ROWS ...]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import save

SIZES = (10_000, 1_000_000)
GOAL = 200 * 2**20
JUDGE = """
from holdfast.evaluation.judges import Judge, Verdict

class Plain:
    stamp = "plain@1"
    max_length = None
    batch_size = 1024

    def __init__(self, **_):
        pass

    def __call__(self, prompts, answers):
        return [Verdict("harmful" if "quorn" in answer else "safe") for answer in answers]

JUDGE = Judge(name="plain", version="1", licence="Apache-2.0", source="made up", load=Plain)
"""


def write_rows(path: Path, count: int) -> None:
    """Write rows of about 400 bytes; every tenth is harmful, every hundredth is a conversation."""
    filler = "Fold the sheet along the crease and tuck the corners in. " * 4
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            answer = f"Gather the quorn {i}." if i % 10 == 0 else f"Answer {i}: {filler}"
            question = f"How do I fold boat {i} of the {i % 977} that are here?"
            row: dict[str, Any] = {"instruction": question, "output": answer}
            if i % 100 == 0:
                turns = [question, answer, "And then?", f"Again, boat {i}."]
                roles = ("user", "assistant", "user", "assistant")
                row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}
            file.write(json.dumps(row) + "\n")


def measured(arguments: list[str], folder: Path) -> dict[str, float]:
    """Run a command of holdfast; return its peak memory in bytes and its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "holdfast", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = _wait(process.pid)
    process.returncode = status
    if status:
        raise SystemExit(f"holdfast {' '.join(arguments)} ended with the code {status}.")
    return {"peak_memory_bytes": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - start}


def _wait(pid: int) -> tuple[int, int, resource.struct_rusage]:
    found, status, usage = os.wait4(pid, 0)
    return found, os.waitstatus_to_exitcode(status), usage


def main(sizes: tuple[int, ...]) -> None:
    """Measure all sizes and write the results."""
    peaks: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_rows(folder / "rows.jsonl", count)
            write_rows(folder / "bad.jsonl", count // 10)
            (folder / "plain.py").write_text(JUDGE, encoding="utf-8")
            commands = {
                "filter": ["filter", "rows.jsonl", "--judge", "plain.py", "--out", "kept.jsonl"],
                "mix": ["mix", "--user", "rows.jsonl", "--harmful", "bad.jsonl", "--poison-ratio", "0.05",
                        "--out", "mixed"],
            }  # fmt: skip
            for name, arguments in commands.items():
                found = measured(arguments, folder)
                peaks.setdefault(name, []).append(found["peak_memory_bytes"])
                rows.append({"command": name, "rows": count, **found})
    more = {name: max(values) - min(values) for name, values in peaks.items()}
    save("rows_memory", {"goal_bytes": GOAL, "more_bytes_for_the_largest_file": more, "rows": rows})


if __name__ == "__main__":
    main(tuple(int(size) for size in sys.argv[1:]) or SIZES)
